"""What a run was: written beside its checkpoints, so that a checkpoint found later can be explained."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_namo.optim.engine import OrthogonalizedOptimizer

PACKAGES = ("lightning-namo", "lightning", "jsonargparse", "numpy")


class RunCard(pl.Callback):
    """Writes run_card.md into the folder of the checkpoints, or of the logger, after the first optimizer step.

    It has the command, the git commit of the working directory, versions and devices, the routing of the parameters,
    and which rank orthogonalizes what. The whole configuration is in config.yaml, which the command line writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new run has a new card."""
        self._written = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write it once the optimizer has shared out its work."""
        if self._written or trainer.global_step == 0:
            return
        self._written = True
        folder = _folder(trainer)  # on all ranks, as Lightning's log_dir is a broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run_card.md").write_text(_card(trainer), encoding="utf-8")


def _folder(trainer: pl.Trainer) -> Path:
    savers = (c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath)
    return Path(next(savers, trainer.log_dir or trainer.default_root_dir))


def _card(trainer: pl.Trainer) -> str:
    facts = {
        "command": " ".join(sys.argv),
        "git commit": _git_commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "torch": torch.__version__,  # with its build (+cu130), which the package's version may lack
        "processes": f"{trainer.world_size} on {trainer.num_nodes} nodes",
        "device": _device(trainer),
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "micro-batches accumulated": trainer.accumulate_grad_batches,
    }
    parts = ["# Run card", *(f"- {name}: {value}" for name, value in facts.items())]
    for optimizer in trainer.optimizers:
        parts += ["", f"## {type(optimizer).__name__}", "", "```text", getattr(optimizer, "routing", ""), "```"]
        if isinstance(optimizer, OrthogonalizedOptimizer):
            parts += ["", "```text", optimizer.sharing(), "```"]
    return "\n".join(parts) + "\n"


def _git_commit() -> str:
    """The commit of the working directory, and whether files differ from it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return f"{commit}{' and uncommitted changes' if changed else ''}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.processor()})"
