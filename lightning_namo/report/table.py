"""The table of runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_namo.report.drawing import Section, Table, colors_of, loss_text
from lightning_namo.report.readings import over_matrices
from lightning_namo.report.runs import TRAIN, VAL, Run
from lightning_namo.report.settings import as_text, differing, of_optimizer, shortened


def runs_section(runs: Sequence[Run]) -> Section:
    """Settings that differ, losses and sizes of all runs."""
    settings = [run.settings for run in runs]
    keys = of_optimizer(settings[0]) if len(runs) == 1 else differing(settings)
    short = shortened(keys)
    header = ["run", f"last {VAL}", f"lowest {VAL}", f"last {TRAIN}", "steps", "tokens", "time", "skipped steps"]
    header += [short[key] for key in keys]
    rows = []
    for run in runs:
        cells = [as_text(run.settings[key]) if key in run.settings else "-" for key in keys]
        rows.append([run.name, *_numbers(run), *cells])
    order = ["From the lowest last loss on."] if len(runs) > 1 else []
    section = Section("Runs", order, table=Table(header, rows, [colors_of(runs)[run.name] for run in runs]))
    if without := [run.name for run in runs if not run.settings]:
        section.lines.append(
            "No settings could be read (config.yaml or hparams.yaml beside the event files; Files says if one is "
            f"broken): {', '.join(without)}."
        )
    elif not keys:
        section.lines.append("The settings of the runs do not differ.")
    if any(skipped_steps(run) is None for run in runs):
        section.lines.append("Skipped steps are those that OptimizerCallback or ReadingLog logged; - where none did.")
    return section


def _numbers(run: Run) -> list[str]:
    val = run.curves.get(VAL)
    finite = [] if val is None else val.values[np.isfinite(val.values)].tolist()
    tokens = run.tokens()
    skipped = skipped_steps(run)
    return [
        _loss(run.last(VAL)),
        _loss(min(finite, default=None)),
        _loss(run.last(TRAIN)),
        f"{run.steps:,}",
        "-" if tokens is None else f"{tokens[0]:,.0f}",
        duration(run.seconds),
        "-" if skipped is None else f"{skipped:,.0f}",
    ]


def skipped_steps(run: Run) -> float | None:
    """Of the matrix with the most, at the end."""
    curve = over_matrices(run, "skipped_steps", "max")
    return None if curve is None else float(curve.values[-1])


def _loss(value: float | None) -> str:
    return "-" if value is None else loss_text(value)


def duration(seconds: float) -> str:
    """A time in the units that suit it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
