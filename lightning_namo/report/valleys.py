"""Learning-rate sweeps: the last loss against the rate, a line for each group of otherwise equal runs."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative

from lightning_namo.report.drawing import Drawing, Section, Table, loss_text, styled
from lightning_namo.report.runs import TRAIN, VAL, Run
from lightning_namo.report.settings import as_text, differing, is_rate, is_seed, of_run, shortened

_ALIKE = 0.95  # share of the longest run's steps


@dataclass(frozen=True)
class Valley:
    """Runs that differ in their learning rate and seed only: by rate, in rising order, the last losses of the seeds.

    ``steps`` are the first and the last of those at which these were logged, ``without`` the rates of runs that have no
    such loss yet.
    """

    name: str
    loss: str
    by_rate: dict[float, list[float]]
    steps: tuple[int, int]
    without: tuple[float, ...] = ()

    @property
    def is_alike(self) -> bool:
        """Whether the losses can be compared."""
        return self.steps[0] >= _ALIKE * self.steps[1]

    def means(self) -> dict[float, float]:
        """The mean over seeds by rate; not a number where a run has diverged."""
        return {rate: float(np.mean(losses)) for rate, losses in self.by_rate.items()}

    def best(self) -> float | None:
        """The rate with the lowest loss."""
        finite = {rate: loss for rate, loss in self.means().items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None


def valleys(runs: Sequence[Run]) -> list[Valley]:
    """The sweeps among runs, each with two rates or more.

    Of several settings that are learning rates, the one with the most values is the axis, and the others tell sweeps
    apart unless they follow from it.
    """
    loss = VAL if any(VAL in run.curves for run in runs) else TRAIN
    groups = defaultdict[str, list[Run]](list)
    for run in runs:
        settings = of_run(run.settings)
        others = {key: as_text(value) for key, value in settings.items() if not is_rate(key) and not is_seed(key)}
        if settings:
            groups[repr(sorted(others.items()))].append(run)
    found = [sweep for members in groups.values() for sweep in _sweeps(members)]
    sweeps = []
    for name, (rate, members) in zip(_names(found), found, strict=True):
        by_rate = defaultdict[float, list[float]](list)
        with_loss = [run for run in members if loss in run.curves]
        for run in with_loss:
            by_rate[_rates(run)[rate]].append(float(run.curves[loss].values[-1]))
        if len(by_rate) < 2:
            continue
        steps = [int(run.curves[loss].steps[-1]) + 1 for run in with_loss]
        without = tuple(_rates(run)[rate] for run in members if loss not in run.curves)
        sweeps.append(Valley(name, loss, dict(sorted(by_rate.items())), (min(steps), max(steps)), without))
    return sweeps


def _rates(run: Run) -> dict[str, float]:
    """A run's learning rates by key."""
    found = {}
    for key, value in of_run(run.settings).items():
        with contextlib.suppress(TypeError, ValueError):  # null, or a list of them
            if is_rate(key) and float(value) > 0:
                found[key] = float(value)
    return found


def _sweeps(members: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The key of the rate and the runs of each sweep among runs whose other settings are equal."""
    keys = dict.fromkeys(key for run in members for key in _rates(run))
    values = {key: {_rates(run)[key] for run in members if key in _rates(run)} for key in keys}
    if not keys or len(values[rate := max(keys, key=lambda key: len(values[key]))]) < 2:
        return []
    members = [run for run in members if rate in _rates(run)]
    by_others = defaultdict[str, list[Run]](list)
    for run in members:
        by_others[repr({key: value for key, value in _rates(run).items() if key != rate})].append(run)
    if sum(len({_rates(run)[rate] for run in each}) for each in by_others.values()) == len(values[rate]):
        return [(rate, members)]
    split = [(rate, each) for each in by_others.values()]
    return [(rate, each) for rate, each in split if len({_rates(run)[rate] for run in each}) > 1]


def _names(sweeps: Sequence[tuple[str, Sequence[Run]]]) -> list[str]:
    """What tells sweeps apart."""
    first = [{k: v for k, v in runs[0].settings.items() if k != rate and not is_seed(k)} for rate, runs in sweeps]
    short = shortened(differing(first))
    return [
        ", ".join(f"{short[key]} {as_text(settings[key])}" for key in short if key in settings) or "all runs"
        for settings in first
    ]


def valleys_section(runs: Sequence[Run]) -> Section:
    """The sweeps as a figure and a table."""
    section, sweeps = Section("Learning rates"), valleys(runs)
    if not sweeps:
        section.lines.append(
            "No learning-rate sweep: no two runs have settings that differ in a number named lr or learning_rate only "
            "(and in the seed)."
        )
        return section
    figure = go.Figure()
    for number, sweep in enumerate(sweeps):
        means = sweep.means()
        hover = [
            f"{sweep.name}<br>lr {rate:g}: {loss_text(loss)}, {len(sweep.by_rate[rate])} seeds"
            for rate, loss in means.items()
        ]
        style = {"color": qualitative.D3[number % len(qualitative.D3)]}
        x, y = list(means), list(means.values())
        figure.add_scatter(name=sweep.name, x=x, y=y, text=hover, hoverinfo="text", mode="lines+markers", line=style)
    ticks = sorted({rate for sweep in sweeps for rate in sweep.by_rate})
    figure.update_xaxes(
        type="log", title_text="learning rate", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]
    )
    figure.update_yaxes(title_text=f"last {sweeps[0].loss}")
    styled(figure, 380)
    says = (
        "The last loss at each learning rate, a mean where there are several seeds; good is a valley whose lowest "
        "point lies between two others. A rate at which a run diverged is left out."
    )
    for sweep in sweeps:
        if not sweep.is_alike:
            section.lines.append(
                f"{sweep.name}: the last losses are of {sweep.steps[0]:,} to {sweep.steps[1]:,} steps and cannot be "
                "compared: some runs go on or broke off."
            )
        if sweep.without:
            rates = ", ".join(f"{rate:g}" for rate in sorted(sweep.without))
            section.lines.append(f"{sweep.name}: no {sweep.loss} yet at {rates}.")
    section.drawings.append(Drawing("Last loss by learning rate", says, figure))
    rows = [
        [sweep.name, f"{rate:g}", loss_text(loss), str(len(sweep.by_rate[rate]))]
        for sweep in sweeps
        for rate, loss in sweep.means().items()
    ]
    section.table = Table(["sweep", "learning rate", f"last {sweeps[0].loss}", "runs"], rows)
    return section
