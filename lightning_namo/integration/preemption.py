"""A checkpoint and an orderly end when a scheduler is about to end the job."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SaveOnSigterm(pl.Callback):
    """Saves a checkpoint and ends the run on SIGTERM, which schedulers send some time before they end a job.

    One rank that gets the signal is enough: all ranks stop after the same optimizer step. The checkpoint is
    last-sigterm-step=N.ckpt beside those of ModelCheckpoint, where ``ckpt_path="last"`` finds it, and has this name
    only once it is complete. Processes exit with 143, as those that SIGTERM ends do. The command line always has this
    callback.

    Lightning's own handler broadcasts, from wherever in a step a rank is when the signal comes: ranks hang unless all
    are at the same collective.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SaveOnSigterm()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._received = False
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of Lightning's handler, until its Trainer restores what there was before."""
        self._received, self._step = False, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self._received = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, ask whether any rank got the signal; if so, save and stop."""
        if trainer.global_step == self._step:
            return  # half of an accumulated gradient would be lost
        self._step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._received, all=False):
            path = _save_complete(trainer, f"last-sigterm-step={self._step}.ckpt")
            rank_zero_info(f"Got SIGTERM: saved {path} after step {self._step}. Go on with ckpt_path=last.")
            raise SIGTERMException(128 + signal.SIGTERM)


def _save_complete(trainer: pl.Trainer, name: str) -> str:
    """Save a checkpoint beside ModelCheckpoint's that has its name only once it is complete."""
    callbacks = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    folder = next((c.dirpath for c in callbacks if c.dirpath), trainer.default_root_dir)
    path = os.path.join(folder, name)
    if "://" in path:  # files in object storage are there as a whole or not at all
        trainer.save_checkpoint(path)
        return path
    trainer.save_checkpoint(f"{path}.unfinished")
    trainer.strategy.remove_checkpoint(path)  # of an earlier run: a folder could not be replaced
    if trainer.is_global_zero:
        os.replace(f"{path}.unfinished", path)
    trainer.strategy.barrier()  # a launcher ends the other ranks as soon as one has ended
    return path
