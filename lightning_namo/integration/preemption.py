"""A checkpoint and an orderly end when a scheduler is about to end the job."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SaveOnSigterm(pl.Callback):
    """Saves a checkpoint and ends the run on SIGTERM, which schedulers send before they end a job, and on Ctrl-C.

    One rank that gets the signal is enough: all ranks stop after the same optimizer step. The checkpoint is
    last-sigterm-step=N.ckpt beside those of ModelCheckpoint, where ``ckpt_path="last"`` finds it, and has this name
    only once it is complete. Processes exit with 143, as those that SIGTERM ends do, and after Ctrl-C as Lightning's
    do; a second Ctrl-C stops at once, without a checkpoint. The command line always has this callback, and prints the
    command that goes on.

    Lightning's own handler broadcasts, from wherever in a step a rank is when the signal comes: ranks hang unless all
    are at the same collective.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SaveOnSigterm()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._received: int | None = None
        self._step = 0
        self._of_ctrl_c: Any = None  # the handler that was there before

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of Lightning's handler, until its Trainer restores what there was before, and of Ctrl-C's."""
        self._received, self._step = None, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            signal.signal(signal.SIGTERM, self._receive)
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a command in the background
                self._of_ctrl_c = signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, *_: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            self._leave_ctrl_c()
            rank_zero_info("\nGot Ctrl-C: saving after this step. Once more stops at once.")

    def _leave_ctrl_c(self) -> None:
        if self._of_ctrl_c is not None:
            signal.signal(signal.SIGINT, self._of_ctrl_c)
            self._of_ctrl_c = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave Ctrl-C to who had it before."""
        self._leave_ctrl_c()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave Ctrl-C to who had it before."""
        self._leave_ctrl_c()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, ask whether any rank got the signal; if so, save and stop."""
        if trainer.global_step == self._step:
            return  # half of an accumulated gradient would be lost
        self._step = trainer.global_step
        received = self._received
        if trainer.strategy.reduce_boolean_decision(received is not None, all=False):
            path = _save_complete(trainer, f"last-sigterm-step={self._step}.ckpt")
            is_ctrl_c = trainer.strategy.reduce_boolean_decision(received == signal.SIGINT, all=False)
            name = "Ctrl-C" if is_ctrl_c else "SIGTERM"
            rank_zero_info(f"Got {name}: saved {path} after step {self._step}. Go on with {_command(path)}")
            raise KeyboardInterrupt if is_ctrl_c else SIGTERMException(128 + signal.SIGTERM)


def _command(path: str) -> str:
    """The command line that goes on from a checkpoint, where this process was started by ours alone."""
    program, *options = sys.argv
    if Path(program).name == "__main__.py" and Path(program).parent.name == "lightning_namo":
        program = "lightning-namo"
    if Path(program).name != "lightning-namo" or "TORCHELASTIC_RUN_ID" in os.environ:
        return f"ckpt_path={path}"
    kept = []
    for option in (left := iter(options)):
        if option == "--ckpt_path":
            next(left, None)
        elif not option.startswith("--ckpt_path="):
            kept.append(option)
    return "\n" + shlex.join([Path(program).name, *kept, "--ckpt_path", path])


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
