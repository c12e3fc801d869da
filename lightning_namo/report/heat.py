"""Readings of matrices over time as heat maps, with bounds apart from values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from lightning_namo.report.drawing import styled
from lightning_namo.report.events import Curve
from lightning_namo.report.readings import AGGREGATES, in_model_order, of_matrices, ordered
from lightning_namo.report.runs import Run

COLUMNS, FEWEST = 120, 12  # of a heat map, at most and at least

BOUNDS = {"_at_most": "at most ", "_at_least": "at least "}
_NEGATIVE = "_negative"
_GREYS, _VIOLET = [[0, "#cfcfcf"], [1, "#6b6b6b"]], [[0, "#b07cd8"], [1, "#b07cd8"]]
_ROW, _LEAST, _MOST, _AROUND = 17, 110, 900, 110  # pixels

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A reading that is drawn: its tag, what it adds to the tag by kind, and whether its logarithm is colored."""

    tag: str
    kinds: tuple[str, ...] = ("",)
    log: bool = False


def heat_map(run: Run, reading: Reading, cells: int) -> go.Figure | None:
    """Matrices by role and depth from above, steps from the left; None without a reading.

    A value is in color, a bound in grey, a negative number in violet. There are as many columns as `cells` allow.
    """
    curves = {kind: of_matrices(run, reading.tag + kind) for kind in reading.kinds}
    labels = ordered(in_model_order(run, [matrix for of_kind in curves.values() for matrix in of_kind]))
    if not labels:
        curves = {kind: _aggregates(run, reading.tag + kind) for kind in reading.kinds}
        labels = {name: name for name in AGGREGATES if any(name in of_kind for of_kind in curves.values())}
    if not labels:
        return None
    x, means = _cells(list(curves.values()), list(labels), max(FEWEST, min(COLUMNS, cells // len(labels))))
    figure = styled(go.Figure(), _AROUND + max(_LEAST, min(_ROW * len(labels), _MOST)))
    compared = means[[kind != _NEGATIVE for kind in reading.kinds]]
    scale = _scale(compared[np.isfinite(compared)], reading.log)
    for kind, mean in zip(reading.kinds, means, strict=True):
        if np.isfinite(mean).any():
            figure.add_trace(_layer(kind, x, list(labels.values()), mean, scale, reading.log))
    figure.update_xaxes(title_text="step", title_standoff=26)
    figure.update_yaxes(autorange="reversed", automargin=True, ticks="", type="category")
    return figure


def _scale(values: Values, log: bool) -> dict[str, object]:
    """The range of colors and its ticks, which are values also where logarithms are colored."""
    if log:
        values = np.log10(values[values > 0])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    bar: dict[str, object] = {"orientation": "h", "y": 1, "yanchor": "bottom", "thickness": 10, "len": 1}
    if log:
        round_numbers = [step * 10.0**power for power in range(-6, 13) for step in (1, 2, 5)]
        ticks = [tick for tick in round_numbers if low <= np.log10(tick) <= high] or [10**low, 10**high]
        ticks = ticks[:: max(1, round(len(ticks) / 4))]
        bar |= {"tickvals": np.log10(ticks).tolist(), "ticktext": [f"{tick:,.4g}" for tick in ticks]}
    return {"zmin": low, "zmax": high, "colorbar": bar}


def _layer(kind: str, x: Values, y: list[str], mean: Values, scale: dict[str, object], log: bool) -> go.Heatmap:
    """The cells of a kind; the others are empty, so that a layer below is seen."""
    keys: dict[str, object] = {"colorscale": "Viridis", "showscale": True, **scale}
    if kind:
        keys = {**scale, "colorscale": _VIOLET if kind == _NEGATIVE else _GREYS, "showscale": False}
    shown, number = mean, "%{z:.3g}"
    if log and kind != _NEGATIVE:
        keys["customdata"], number = mean.astype("f4"), "%{customdata:.3g}"
        shown = np.log10(np.where(mean > 0, mean, np.nan))
    hover = f"%{{y}}, step %{{x:.0f}}: {BOUNDS.get(kind, '')}{number}<extra></extra>"
    return go.Heatmap(x=x.astype("f4"), y=y, z=shown.astype("f4"), hovertemplate=hover, hoverongaps=False, **keys)


def _aggregates(run: Run, tag: str) -> dict[str, Curve]:
    return {name: run.curves[f"{tag}/{name}"] for name in AGGREGATES if f"{tag}/{name}" in run.curves}


def _cells(curves: Sequence[Mapping[str, Curve]], rows: Sequence[str], most: int) -> tuple[Values, Values]:
    """Steps of at most `most` columns, and by kind, row and column the mean of what was logged.

    Columns have equal numbers of logged steps. A cell is of the kind that most of its readings are of; of the other
    kinds it is not a number.
    """
    steps = np.unique(np.concatenate([curve.steps for of_kind in curves for curve in of_kind.values()]))
    columns = min(len(steps), most)
    column_of = np.arange(len(steps)) * columns // len(steps)
    counts, sums = np.zeros((2, len(curves), len(rows), columns))
    for k, of_kind in enumerate(curves):
        for row, matrix in enumerate(rows):
            if (curve := of_kind.get(matrix)) is not None:
                finite = curve[np.isfinite(curve.values)]
                column = column_of[np.searchsorted(steps, finite.steps)]
                counts[k, row] = np.bincount(column, minlength=columns)
                sums[k, row] = np.bincount(column, finite.values, minlength=columns)
    kind = np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), -1)
    of_kind = np.arange(len(curves))[:, None, None] == kind
    means = np.where(of_kind, sums / np.maximum(counts, 1), np.nan)
    return np.bincount(column_of, steps) / np.bincount(column_of), means
