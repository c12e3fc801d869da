"""Figures in the page's style, and lines of runs in panels one above the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import qualitative, sample_colorscale
from plotly.subplots import make_subplots

from lightning_namo.report.curves import binned, points_of, smoothed
from lightning_namo.report.events import Curve
from lightning_namo.report.runs import Run

LEGEND = 10  # lines; with more runs their table is the legend


@dataclass(frozen=True)
class Drawing:
    """A figure with its heading and the sentence below it; a folded one is shown when it is opened."""

    heading: str
    caption: str
    figure: go.Figure
    folded: bool = False

    @property
    def legend(self) -> dict[str, str]:
        """Colors of lines by name; below the figure, where it takes nothing from the plot."""
        colors = {trace.name: trace.line.color for trace in self.figure.data if trace.type == "scatter"}
        return colors if 1 < len(colors) <= LEGEND else {}


@dataclass(frozen=True)
class Table:
    """Cells as text; `colors` of the rows, where these are runs."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    colors: Sequence[str] = ()


@dataclass
class Section:
    """A part of the page and of the summary: lines of text, a table, figures."""

    title: str
    lines: list[str] = field(default_factory=list)
    table: Table | None = None
    drawings: list[Drawing] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """A row of a figure: its title and the curve of a run in it."""

    title: str
    curve_of: Callable[[Run], Curve | None]
    share: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """What curves are drawn against; `of` gives it for a run's curve, None where it is not known."""

    title: str
    of: Callable[[Run, Curve], NDArray[np.float64] | None]


STEPS = Axis("step", lambda run, curve: curve.steps.astype(float))


def colors_of(runs: Sequence[Run]) -> dict[str, str]:
    """A color for each run by its name; of more than ten they go from blue to red."""
    if len(runs) <= len(qualitative.D3):
        return dict(zip((run.name for run in runs), qualitative.D3, strict=False))
    shades = sample_colorscale("Turbo", np.linspace(0.08, 0.92, len(runs)).tolist())
    return {run.name: shade for run, shade in zip(runs, shades, strict=True)}


def as_number(value: float) -> str:
    """A number of any size in three digits; thousands whole."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def loss_text(value: float) -> str:
    """A loss of any size: four decimals, or four digits where these say nothing."""
    return f"{value:.4g}" if math.isfinite(value) and value and not 0.01 <= abs(value) < 1e4 else f"{value:.4f}"


def styled(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure its size and narrow margins."""
    margin = {"l": 56, "r": 12, "t": 48, "b": 44}
    figure.update_layout(template="none", height=height, margin=margin, showlegend=False, hovermode="closest")
    return figure


def lines(
    runs: Sequence[Run], panels: Sequence[Panel], axis: Axis = STEPS, smoothing: float = 0.0, height: int = 200
) -> go.Figure | None:
    """Curves of runs, a panel above the other, as far as there are any; None: there are none."""
    colors, points = colors_of(runs), points_of(len(runs))
    shown = []
    for panel in panels:
        found = [(run, curve) for run in runs if (curve := panel.curve_of(run)) is not None]
        placed = [(run, curve, x) for run, curve in found if (x := axis.of(run, curve)) is not None]
        if placed:
            shown.append((panel, placed))
    if not shown:
        return None
    figure = stacked([panel.title for panel, _ in shown], axis.title)
    for row, (panel, placed) in enumerate(shown, start=1):
        for run, curve, x in placed:
            y = binned(smoothed(curve.values, smoothing), points)
            mode = "lines+markers" if panel.markers and len(y) <= 50 else "lines"
            trace = line(run.name, binned(x, points), y, colors[run.name], mode=mode)
            figure.add_trace(trace, row=row, col=1)
        if panel.share:
            figure.update_yaxes(rangemode="nonnegative", row=row, col=1)
    return styled(figure, 92 + height * len(shown))


def stacked(titles: Sequence[str], x_title: str) -> go.Figure:
    """Empty panels one above the other with their titles at the left."""
    count = len(titles)
    figure = make_subplots(
        count, 1, shared_xaxes=True, vertical_spacing=0.22 / count if count > 1 else 0, subplot_titles=titles
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13, yshift=3)
    figure.update_xaxes(title_text=x_title, title_standoff=6, row=count, col=1)
    return figure


def line(name: str, x: NDArray[np.float64], y: NDArray[np.float64], color: str, **keys: object) -> go.Scatter:
    """A line of a run, in 32 bits."""
    keys = {"mode": "lines", "line": {"color": color, "width": 1.6}, **keys}
    return go.Scatter(name=name, legendgroup=name, x=x.astype("f4"), y=y.astype("f4"), **keys)
