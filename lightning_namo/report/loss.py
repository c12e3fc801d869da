"""Loss against steps, tokens and time."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_namo.report.curves import points_of
from lightning_namo.report.drawing import STEPS, Axis, Drawing, Panel, Section, lines
from lightning_namo.report.runs import TRAIN, VAL, Run

_UNITS = (("hours", 3600.0, 7200.0), ("minutes", 60.0, 300.0), ("seconds", 1.0, 0.0))  # and the time that they begin at


def loss_section(runs: Sequence[Run], smoothing: float) -> Section:
    """Training and validation loss of all runs, and what is missing of them."""
    section = Section("Loss")
    unit, second, _ = next(unit for unit in _UNITS if max(run.seconds for run in runs) >= unit[2])
    axes = {
        "steps": STEPS,
        "tokens": Axis("tokens", lambda run, curve: run.tokens(curve.steps)),
        "time": Axis(f"{unit} without pauses between sessions", lambda run, curve: curve.seconds / second),
    }
    panels = [
        Panel(TRAIN, lambda run: run.curves.get(TRAIN)),
        Panel(VAL, lambda run: run.curves.get(VAL), markers=True),
    ]
    says = {
        "steps": "Each run's loss; good is a curve that is lower at its end and still falls.",
        "tokens": "The same against the tokens of all devices, for runs whose batches differ; the lower curve learns "
        "more from as much text.",
        "time": "The same against time, with that of validation and checkpoints; the lower curve is the better use of "
        "the machine.",
    }
    for name, axis in axes.items():
        if (figure := lines(runs, panels, axis, smoothing)) is not None:
            section.drawings.append(Drawing(f"Loss against {name}", says[name], figure))
    for tag in (TRAIN, VAL):
        _say_missing(section, f"{tag} was not logged", [run for run in runs if tag not in run.curves], runs)
    _say_missing(
        section,
        "Tokens are not known (no ThroughputMonitor or TokenThroughput logged train/lengths)",
        [run for run in runs if run.tokens() is None],
        runs,
    )
    if section.drawings:
        shown = f"Curves longer than {points_of(len(runs))} points are drawn as means over equal numbers of points"
        smooth = f"; before that they are smoothed exponentially with weight {smoothing:g}" if smoothing else ""
        section.lines.append(f"{shown}{smooth}.")
    return section


def _say_missing(section: Section, what: str, lacking: Sequence[Run], runs: Sequence[Run]) -> None:
    if lacking:
        section.lines.append(f"{what} in {among(lacking, runs)}.")


def among(some: Sequence[Run], runs: Sequence[Run]) -> str:
    """Some runs in words."""
    if len(some) == len(runs):
        return "any run" if len(runs) > 1 else "this run"
    named = ", ".join(run.name for run in some[:5])
    return f"{named} and {len(some) - 5} more runs" if len(some) > 5 else named
