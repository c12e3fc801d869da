"""`generate`: the text that transformers generates, by the run's own tokenizer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from lightning_namo.cli import main
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.export import export
from lightning_namo.gpt2.generate import generate
from lightning_namo.gpt2.load import find_vocabulary
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module
from tests.helpers.gpt2 import TALE, VERSION, contents, saved


def test_generate_prints_the_text_that_transformers_generates(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(str(trained), "It was the", max_new_tokens=12, temperature=0.0)
    export(str(trained), str(tmp_path / "hf"))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = model.generate(**tokenizer("It was the", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("It was the")
    assert len(text) > 15
    capsys.readouterr()
    main(["generate", "--ckpt_path", str(trained), "--prompt", "It was the", "--max_new_tokens=12", "--temperature=0"])
    assert text.split()[-1] in capsys.readouterr().out


def test_generate_repeats_itself_with_the_same_seed_only(trained: Path) -> None:
    one, again, other = (generate(str(trained), "It", max_new_tokens=20, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_generate_takes_the_last_checkpoint_of_a_run_s_folder(trained: Path, tmp_path: Path) -> None:
    run = next(folder for folder in trained.parents if (folder / "config.yaml").exists())
    expected = generate(str(trained), "It", 8)
    earlier = tmp_path / "run" / "version_0" / "checkpoints" / "step=1.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"not one that is read")
    os.utime(earlier, ns=(0, 0))
    (earlier.parent / "step=2.ckpt").symlink_to(trained)
    data = next(folder for folder in trained.parents if (folder / "text.txt").exists()) / "data"
    assert generate(str(tmp_path / "run"), "It", 8, data_dir=str(data)) == expected
    assert generate(str(run), "It", 8) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"or with checkpoints \(\*\.ckpt\) below it\. Got the folder"):
        generate(str(tmp_path / "empty"), "It")


def test_generate_takes_the_tokenizer_of_a_folder_as_well(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(trained.read_bytes())
    data = next(folder for folder in trained.parents if (folder / "text.txt").exists()) / "data"
    assert generate(str(alone), "It", 8, data_dir=str(data)) == generate(str(trained), "It", 8)


def test_generate_starts_a_document_without_a_prompt_and_ends_with_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TALE)
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "data"), vocab_size=257)
    torch.manual_seed(0)
    data = {VERSION: "2", "hyper_parameters": {**vars(GPT2Config(257, 8, 1, 1, 4))}}
    network = GPT2(GPT2Config(257, 8, 1, 1, 4))
    vocabulary = find_vocabulary(Path("x"), 257, str(tmp_path / "data"))
    with torch.no_grad():  # the end of a document is the only token that anything speaks for
        network.transformer["wte"].weight.zero_()[vocabulary.end] = torch.tensor([9.0, -9.0, 9.0, -9.0])
    path = saved(tmp_path / "ends.ckpt", {**data, "state_dict": network.state_dict()})
    assert generate(str(path), "", 5, temperature=0.0, data_dir=str(tmp_path / "data")) == ""


def test_generate_takes_gpt2_s_ids_from_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    encoding = SimpleNamespace(encode_ordinary=lambda text: [15496], decode=lambda ids: f"Hello {len(ids)}")
    fake = SimpleNamespace(get_encoding=lambda name: asked.append(name) or encoding)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)  # the real one downloads
    module = GPT2Module(block_size=4, n_layer=1, n_head=1, n_embd=2)
    path = str(saved(tmp_path / "gpt2.ckpt", contents(module)))
    assert generate(path, "Hello", 3, vocab_size=50257) == "Hello 4"
    assert asked == ["gpt2"]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        ValueError, match=r"Expected GPT-2's tokenizer of tiktoken: pip install 'lightning-namo\[data\]"
    ):
        generate(path, "Hello", 3, vocab_size=50257)
