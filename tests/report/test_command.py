"""The command on a run that was trained."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_namo import NAMOD, OptimizerCallback
from lightning_namo.cli import main
from tests.helpers.command_line import complaint

BATCH, STEPS = 8, 60


class Small(pl.LightningModule):
    """Two matrices that learn a linear map."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (self.layers(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self.layers(batch[0]) - batch[1]).square().mean())


def train(folder: Path, lr: float) -> None:
    pl.seed_everything(0, verbose=False)
    x = torch.randn(BATCH * STEPS, 6)
    data = DataLoader(TensorDataset(x, x.flip(1)), BATCH)
    optimizer = OptimizerCallback(functools.partial(NAMOD, lr=lr), heads="matrix", first_layers="matrix")
    monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), length_fn=lambda batch: batch[0].numel())
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name=f"lr_{lr}"),
        callbacks=[optimizer, monitor],
        max_epochs=1,
        log_every_n_steps=5,
        val_check_interval=20,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Small(lr), data, data)


def test_the_command_reports_on_runs_that_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for lr in (0.01, 0.05):
        train(tmp_path / "runs", lr)
    capsys.readouterr()
    main(["report", "runs/lr_0.01", "runs/lr_0.05", "--out", "pages/report.html", "--smoothing", "0.5"])
    assert json.loads(capsys.readouterr().out) == {"page": "pages/report.html", "summary": "pages/report.md", "runs": 2}
    summary = Path("pages/report.md").read_text("utf-8")
    for lr in (0.01, 0.05):
        events = EventAccumulator(f"runs/lr_{lr}/version_0", size_guidance={"scalars": 0}).Reload()
        val = [scalar.value for scalar in events.Scalars("val/loss")]
        last = events.Scalars("train/loss")[-1].value
        tokens = BATCH * STEPS * 6
        row = f"| lr_{lr} | {val[-1]:.4f} | {min(val):.4f} | {last:.4f} | {STEPS} | {tokens:,} | "
        assert row in summary
        assert f"| all runs | {lr} | {val[-1]:.4f} | 1 |" in summary
        assert f"\n| lr_{lr} | {events.Scalars('step_scale/median')[-1].value:.3g} | " in summary
    assert "the best, " in summary, "the better of two rates is at an edge"
    page = Path("pages/report.html").read_text("utf-8")
    assert all(f"{name}, lr_0.05" in page for name in ("Step scale", "Signal fraction"))


def test_a_path_without_runs_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Expected event files (events.out.tfevents.*) in or below {tmp_path}." in complaint(
        capsys, "report", str(tmp_path)
    )
    assert "Expected one or more runs" in complaint(capsys, "report", "--runs", "[]")
