"""Command lines: small ones, what they say to wrong input, and modules and data of the user's own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_namo.cli import main
from tests.helpers.paths import CONFIGS

QUICKSTART = f"--config={CONFIGS / 'quickstart.yaml'}"
SMALL = ("--model.n_layer=1", "--model.n_embd=12", "--model.n_head=2")
OWN = (f"--model={__name__}.Toy", f"--data={__name__}.NoData")  # the user's
QUIET = ("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")


class Toy(pl.LightningModule):
    """A module of the user's own, without an optimizer."""

    def __init__(self, width: int = 4, vocab_size: int = 7) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
        self.vocab_size = vocab_size

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ValueError("a bug of the user's own")

    def train_dataloader(self) -> list[torch.Tensor]:
        return [torch.zeros(1)]


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command line that must end with exit code 2 and one message; return that."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("error: ") == 1
    assert len(captured.err.split("error: ")[0].splitlines()) < 12  # no pages of usage before it
    return captured.err.split("error: ")[1]


class NoData(pl.LightningDataModule):
    """Leaves the data to the module."""

    def train_dataloader(self) -> list[torch.Tensor]:
        return [torch.zeros(1)]
