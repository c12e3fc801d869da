"""A small GPT-2: its checkpoints, a run of the command line, and the command lines that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from lightning_namo.cli import main
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.module import GPT2Module
from tests.helpers.command_line import QUICKSTART

TALE = "It was the best of times, it was the worst of times, it was the age of wisdom. "
VERSION = "pytorch-lightning_version"


def train_gpt2(folder: Path, *options: str) -> Path:
    """Three steps of `lightning-namo fit` on a text of its own; the checkpoint."""
    (folder / "text.txt").write_text(TALE * 60)
    vocabulary = prepare([str(folder / "text.txt")], str(folder / "data"), vocab_size=270)["vocab_size"]
    assert vocabulary % 64  # so that the network's is padded
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.accelerator=cpu"]
    sizes = ["--model.n_layer=2", "--model.n_embd=32", "--model.n_head=2", "--data.block_size=16"]
    saver = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3"]
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {folder}}}}}"
    data = ["--data.data_dir", str(folder / "data"), "--data.batch_size=2"]
    main(["fit", QUICKSTART, *sizes, *data, *steps, *saver, logger, *options])
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint


def contents(module: GPT2Module | None = None, **changes: Any) -> dict[str, Any]:
    """What a checkpoint of an untrained GPT2Module holds."""
    torch.manual_seed(0)
    module = module or GPT2Module(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=8)
    module.configure_model()
    return {VERSION: "2", "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), **changes}


def saved(path: Path, data: Any) -> Path:
    torch.save(data, path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command line says that ends with exit code 2: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lightning-namo: error: Expected ")
    assert "Got " in lines[0]
    return lines[0]


BLOCK, WINDOWS, VAL_WINDOWS, BATCH = 8, 23, 7, 2


class TinyGPT2(GPT2Module):
    """A tiny GPT-2 with AdamW."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"vocab_size": 257, "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 16, **changes})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def tiny_data(folder: Path, num_workers: int = 0) -> TextDataModule:
    return TextDataModule(str(folder), BLOCK, BATCH, num_workers, seed=5, vocab_size=257)


def tiny_trainer(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    small = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **small, **options})
