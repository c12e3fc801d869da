"""Runs below folders: their names, curves, settings and sizes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_namo.progress import counted
from lightning_namo.report.events import AFTER, PATTERN, Curve, read_folder
from lightning_namo.report.settings import FILES, Settings, read_settings

TRAIN, VAL = "train/loss", "val/loss"


@dataclass
class Run:
    """What a folder of event files says; ``broken`` has a line for each file that could not be read whole."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken; the first is logged as 0."""
        return max((int(curve.steps[-1]) + 1 for curve in self._trained()), default=0)

    @property
    def seconds(self) -> float:
        """Time from the start of the first session to the last record, without the pauses between sessions."""
        return max((float(curve.seconds.max()) for curve in self._trained()), default=0.0)

    def _trained(self) -> list[Curve]:
        return [curve for tag, curve in self.curves.items() if not AFTER.fullmatch(tag)]

    def last(self, tag: str) -> float | None:
        """The last value of a curve; None without one."""
        return float(self.curves[tag].values[-1]) if tag in self.curves else None

    def tokens(self, steps: NDArray[np.int64] | None = None) -> NDArray[np.float64] | None:
        """Tokens of all devices up to each step, by default the last one; None where no ThroughputMonitor logged them.

        The monitor counts from 0 in every session, so what lies between two sessions follows from the tokens of a step.
        """
        if (lengths := self.curves.get("train/lengths")) is None:
            return None
        grown = np.diff(lengths.values, prepend=0.0)
        taken = np.diff(lengths.steps, prepend=-1)
        goes_on = grown > 0
        goes_on[0] = len(grown) == 1 or taken[0] <= 2 * taken[1:].min()  # else the run began elsewhere
        a_step = float(grown[goes_on].sum() / taken[goes_on].sum()) if goes_on.any() else 0.0
        total = np.cumsum(np.where(goes_on, grown, taken * a_step))
        far = 10**9  # steps after the last record, for what was logged after it
        known = np.array([-1, *lengths.steps, lengths.steps[-1] + far])
        wanted = np.array([self.steps - 1]) if steps is None else steps
        found: NDArray[np.float64] = np.interp(wanted, known, np.array([0.0, *total, total[-1] + far * a_step]))
        return found * self._devices()

    def _devices(self) -> int:
        rates = [self.last(f"train/{of}items_per_sec") for of in ("", "device/")]
        return round(rates[0] / rates[1]) if rates[0] and rates[1] else 1


def by_loss(runs: Sequence[Run]) -> list[Run]:
    """Runs from the lowest last validation loss on; then those without a finite one, by their training loss."""

    def last_losses(run: Run) -> list[float]:
        found = [run.last(tag) for tag in (VAL, TRAIN)]
        return [value if value is not None and math.isfinite(value) else math.inf for value in found]

    return sorted(runs, key=last_losses)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read all runs at and below paths.

    Raises:
        ValueError: A path without event files at it or below it.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path))))
    named = list(zip(names(folders), folders, strict=True))
    shown = counted(named, lambda _: 1, desc="Reading runs", unit="run", total=len(named))
    return [_read(name, folder) for name, folder in shown]


def _run_folders(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        raise ValueError(
            f"Expected a folder of runs. Got {path}, which is {'a file' if path.exists() else 'not there'}."
        )
    found, seen = [], set[Path]()
    for name, folders, files in os.walk(path, followlinks=True):
        folder = Path(name).resolve()
        folders[:] = sorted(folders) if folder not in seen else []  # a link may lead back
        if folder not in seen and any(fnmatchcase(file, PATTERN) for file in files):
            found.append(folder)
        seen.add(folder)
    writers = [folder for folder in found if any((folder / name).exists() for name in FILES)]
    found = [f for f in found if f in writers or not any(w in f.parents for w in writers)]  # SummaryWriter.add_scalars'
    if not found:
        raise ValueError(f"Expected event files ({PATTERN}) in or below {path}. Got none: is it a logger's save_dir?")
    yield from found


def names(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart, out of their paths below what they have in common."""
    if len(folders) == 1:
        last = folders[0].parts[-2:]
        return ["/".join(last if last[-1].startswith("version_") else last[-1:])]
    common = Path(os.path.commonpath(folders))
    parts = [folder.relative_to(common).parts for folder in folders]
    while min(map(len, parts)) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    if len({len(each) for each in parts}) == 1:
        differs = [len(set(place)) > 1 for place in zip(*parts, strict=True)]
        parts = [tuple(p for p, keep in zip(each, differs, strict=True) if keep) for each in parts]
    found = ["/".join(each) or common.name for each in parts]
    return found if len(set(found)) == len(found) else [str(folder.relative_to(common.parent)) for folder in folders]


def _read(name: str, folder: Path) -> Run:
    curves, broken = read_folder(folder)
    settings, complaint = read_settings(folder)
    return Run(name, curves, settings, broken + ([complaint] if complaint else []))
