"""Commands on a checkpoint: the exported GPT-2 computes what the trained one does, and wrong input is said in words."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_namo.cli import main
from lightning_namo.gpt2.data.encoding import END_OF_TEXT
from lightning_namo.gpt2.export import export, to_transformers
from lightning_namo.gpt2.load import Vocabulary, find_vocabulary
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module
from tests.helpers.gpt2 import TALE, contents, refusal, saved


def test_the_exported_model_computes_the_same_logits_and_generates(trained: Path, tmp_path: Path) -> None:
    main(["export", "--ckpt_path", str(trained), "--out_dir", str(tmp_path / "hf")])
    module = GPT2Module.load_from_checkpoint(trained, map_location="cpu").eval()
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.vocab_size == len(tokenizer) < module.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids = torch.randint(len(tokenizer), (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = module(ids)[..., : len(tokenizer)], model(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert ours.std() > 0.1  # an agreement on something
    assert model.generate(ids[:, :4], max_new_tokens=5, pad_token_id=0).shape[1] <= 9


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_equal_where_the_approximate_gelu_would_differ(bias: bool) -> None:
    torch.manual_seed(0)
    network = GPT2(GPT2Config(64, 8, 2, 2, 8, bias=bias)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
        ids = torch.randint(60, (2, 8))
        ours, theirs = network(ids)[..., :60], to_transformers(network, Vocabulary(60, None))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_the_exported_tokenizer_is_the_run_s(trained: Path, tmp_path: Path) -> None:
    export(str(trained), str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = find_vocabulary(trained, 320).tokenizer
    assert own is not None
    for text in (TALE, " \n two\tlines, naïve — ok", f"a{END_OF_TEXT}b"):
        assert tokenizer(text).input_ids == own.encode(text).ids
    assert tokenizer.decode(own.encode(TALE).ids) == TALE


def test_the_exported_model_keeps_its_precision(tmp_path: Path) -> None:
    data = contents()
    data["state_dict"] = {name: weight.bfloat16() for name, weight in data["state_dict"].items()}
    report = export(str(saved(tmp_path / "bf16.ckpt", data)), str(tmp_path / "hf"))
    assert report["tokenizer"] is False
    assert report["vocab_size"] == 64
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_vocabulary_can_be_trimmed_to_gpt2_s(tmp_path: Path) -> None:
    module = GPT2Module(block_size=4, n_layer=1, n_head=1, n_embd=2)
    export(str(saved(tmp_path / "padded.ckpt", contents(module))), str(tmp_path / "hf"), vocab_size=50257)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, module.model.lm_head.weight[:50257])
    assert model.config.eos_token_id == 50256


@pytest.mark.parametrize(("command", "option"), [("export", "--out_dir"), ("consolidate", "--out")])
def test_an_output_that_exists_is_kept(
    command: str, option: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    args = [command, "--ckpt_path", str(checkpoint), option, str(tmp_path / "mine")]
    assert "Expected a new path to write to." in refusal(capsys, *args)
    assert "Got " in refusal(capsys, *args, "--overwrite", "true")  # it is not what the command makes
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_an_earlier_export_is_replaced_if_asked_and_kept_if_the_new_one_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "hf"
    export(str(checkpoint), str(target))
    (target / "old.txt").write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            export(str(checkpoint), str(target), overwrite=True)
    assert (target / "old.txt").exists()
    report = export(str(checkpoint), str(target), overwrite=True)
    assert (
        report["files"] == sorted(os.listdir(target)) == ["config.json", "generation_config.json", "model.safetensors"]
    )
    assert os.listdir(tmp_path) == ["hf"]


def test_without_transformers_export_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-namo\[export\]'"):
        export(str(checkpoint), str(tmp_path / "hf"))
