"""A GPT-2 out of a checkpoint, its vocabulary, and what is refused before anything is written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.export import export
from lightning_namo.gpt2.generate import generate
from lightning_namo.gpt2.load import find_vocabulary, load_network
from tests.helpers.gpt2 import TALE, contents, refusal, saved

OUTPUT = {"export": ("--out_dir", "hf"), "generate": ("--prompt", "Hello"), "consolidate": ("--out", "whole.ckpt")}


@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.model.", "module._forward_module.model._orig_mod."])
@pytest.mark.parametrize("without", ["lm_head.weight", "transformer.wte.weight", None])
def test_names_of_wrappers_and_either_name_of_the_tied_weight_make_no_difference(
    prefix: str, without: str | None, tmp_path: Path
) -> None:
    data = contents()
    expected = {name.removeprefix("model."): weight for name, weight in data["state_dict"].items()}
    data["state_dict"] = {
        prefix + name.replace("h.0.", "h.0._orig_mod."): w for name, w in expected.items() if name != without
    }
    network = load_network(saved(tmp_path / "wrapped.ckpt", data))
    torch.testing.assert_close(dict(network.state_dict()), expected, rtol=0, atol=0)
    assert network.lm_head.weight is network.transformer["wte"].weight


def test_the_embedded_corpus_is_known_by_the_config_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    data = {"class_path": "lightning_namo.gpt2.data.TextDataModule", "init_args": {"data_dir": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    vocabulary = find_vocabulary(tmp_path / "checkpoints" / "step=1.ckpt", 4096)
    assert vocabulary.tokenizer is not None
    assert vocabulary.size == 4096
    assert vocabulary.tokenizer.decode(vocabulary.tokenizer.encode("My fellow Americans").ids) == "My fellow Americans"


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class NoGPT2(pl.LightningModule):
    def __init__(self, vocab_size: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def head_untied(data: dict[str, Any]) -> dict[str, Tensor]:
    return {**data["state_dict"], "model.lm_head.weight": data["state_dict"]["model.lm_head.weight"] + 1}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no torch file": (lambda: b"text", "cannot be read: "),
    "empty": (lambda: b"", "cannot be read: "),
    "cut short": (lambda: b"PK\x03\x04" + bytes(100), "cannot be read: "),
    "code": (lambda: {**contents(), "callbacks": Evil()}, "cannot be read: "),
    "a list": (lambda: [1], "with <class 'list'>"),
    "weights only": (lambda: contents()["state_dict"], "with the keys ['model.lm_head.weight', "),
    "no shape": (lambda: contents(hyper_parameters={"vocab_size": 64}), "without the hyperparameter block_size"),
    "another module": (lambda: contents(state_dict=NoGPT2().state_dict()), "without transformer.wte.weight"),
    "more weights": (
        lambda: contents(state_dict={**contents()["state_dict"], "ema": torch.ones(1)}),
        "with ema beside",
    ),
    "another size": (
        lambda: contents(hyper_parameters={**contents()["hyper_parameters"], "block_size": 9}),
        "with transformer.wpe.weight of shape (8, 8); its hyperparameters say (9, 8).",
    ),
    "another head": (lambda: contents(state_dict=head_untied(contents())), "a head that is not tied"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["export", "generate"])
def test_what_is_no_checkpoint_of_a_gpt2_is_refused_before_anything_is_written(
    command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    data = make()
    if isinstance(data, bytes):
        Path("bad.ckpt").write_bytes(data)
    else:
        torch.save(data, "bad.ckpt")
    assert message in refusal(capsys, command, "--ckpt_path", "bad.ckpt", *OUTPUT[command])
    assert os.listdir() == ["bad.ckpt"]


@pytest.mark.parametrize("command", OUTPUT)
def test_a_path_without_a_checkpoint_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, command, "--ckpt_path", "nowhere.ckpt", *OUTPUT[command])
    assert message.endswith("Expected a checkpoint. Got nowhere.ckpt, which does not exist.")
    Path("folder").mkdir()
    message = refusal(capsys, command, "--ckpt_path", "folder", *OUTPUT[command])
    assert message.endswith(
        "Expected a checkpoint: a file, or a folder with .metadata or with checkpoints (*.ckpt) below it. Got the "
        "folder folder."
    )
    for name in (".metadata", "meta.pt"):
        Path("folder", name).write_bytes(pickle.dumps({}))
    message = refusal(capsys, command, "--ckpt_path", "folder", *OUTPUT[command])
    assert "Got folder, which cannot be read: " in message
    assert os.listdir() == ["folder"]


def test_a_tokenizer_that_cannot_be_the_run_s_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected the tokenizer of the run. Got none"):
        generate(str(checkpoint), "Hello")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"Expected data_dir to have a tokenizer.json"):
        generate(str(checkpoint), "Hello", data_dir=str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(TALE)
    prepare([str(tmp_path / "text.txt")], str(tmp_path / "data"), vocab_size=257)
    with pytest.raises(ValueError, match=r"at most 64 tokens, as the network has. Got 257"):
        export(str(checkpoint), str(tmp_path / "hf"), data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"Expected vocab_size to be that of the tokenizer, 257. Got 60"):
        export(str(checkpoint), str(tmp_path / "hf"), data_dir=str(tmp_path / "data"), vocab_size=60)
    with pytest.raises(ValueError, match=r"at most 64 tokens, as the network has. Got 65"):
        export(str(checkpoint), str(tmp_path / "hf"), vocab_size=65)
    assert not (tmp_path / "hf").exists()
