"""Event files and runs with known numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter

from lightning_namo.report.events import PATTERN, Curve
from lightning_namo.report.runs import Run
from lightning_namo.report.settings import _flatten

Scalars = Mapping[str, Mapping[int, float]]  # by tag and step


def write(folder: Path, scalars: Scalars, began: float = 1000.0, **config: Any) -> Path:
    """Write a session of a run, a second a step from `began` on, with LightningCLI's config; returns the event file."""
    before = set(folder.glob(PATTERN))
    with SummaryWriter(str(folder)) as writer:
        in_order = sorted((step, tag, value) for tag, of_tag in scalars.items() for step, value in of_tag.items())
        first = min(step for step, _, _ in in_order)
        for step, tag, value in in_order:
            writer.add_scalar(tag, value, step, walltime=began + step - first)
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (path,) = set(folder.glob(PATTERN)) - before
    return path


def optimizer(name: str = "NAMOD", **init_args: Any) -> dict[str, Any]:
    """The section of a config."""
    return {"optimizer": {"class_path": f"lightning_namo.{name}", "init_args": init_args}}


def curve(values: Mapping[int, float]) -> Curve:
    steps = np.array(list(values), np.int64)
    return Curve(steps, np.array(list(values.values()), float), steps.astype(float))


def logged_run(name: str, scalars: Scalars, **config: Any) -> Run:
    """A run as it is read, without files."""
    curves = {tag: curve(values) for tag, values in scalars.items()}
    return Run(name, curves, dict(_flatten(config)) if config else {})
