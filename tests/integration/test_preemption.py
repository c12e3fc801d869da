"""SIGTERM on one process; whole jobs are in tests/distributed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_namo import OptimizerCallback
from lightning_namo.integration.preemption import SaveOnSigterm
from tests.helpers.toy import Net, fit


class Interrupted(pl.Callback):
    """SIGTERM before the first of two micro-batches."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_for_the_end_of_an_accumulated_step(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    callbacks = [OptimizerCallback(), SaveOnSigterm(), Interrupted()]
    options = {"accumulate_grad_batches": 2, "default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(SystemExit) as ended:
        fit(Net(), *callbacks, max_steps=4, **options)
    assert ended.value.code == 128 + signal.SIGTERM
    saved = torch.load(tmp_path / "checkpoints" / "last-sigterm-step=2.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 4
    assert signal.getsignal(signal.SIGTERM) == before
