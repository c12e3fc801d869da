"""Sections on what was logged of matrices: heat maps, spectra, clamps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from plotly.colors import hex_to_rgb, unlabel_rgb

from lightning_namo.report.curves import binned, points_of
from lightning_namo.report.drawing import (
    Drawing,
    Panel,
    Section,
    Table,
    as_number,
    colors_of,
    line,
    lines,
    stacked,
    styled,
)
from lightning_namo.report.events import Curve
from lightning_namo.report.heat import BOUNDS, Reading, heat_map
from lightning_namo.report.readings import over_matrices
from lightning_namo.report.runs import Run

MOST = 6
"""Runs whose single matrices are shown."""

_CELLS = 24_000  # of a reading's heat maps together
_FANS = 3  # runs whose quantiles are shown, one over the other

_LAYERS = {
    "step scale": Reading("step_scale", log=True),
    "signal fraction": Reading("signal_fraction", ("", "_at_most", "_negative"), log=True),
    "noise scale (samples)": Reading("noise_scale", ("", "_at_least"), log=True),
}
_LAYERS_SAY = {
    "step scale": "NAMO's adaptive number: 1 where gradients agree, 0.17 in noise; good are layers that are alike.",
    "signal fraction": "The share of a gradient that persists, from the optimizer's averages: a large one is safe to "
    "act on, a small one is noise or a signal that turns. Grey: an upper bound. Violet: negative, "
    "gradients oppose each other.",
    "noise scale (samples)": "The batch at which noise is as large as the signal, if what does not persist is noise; "
    "good is a batch of about this size. Grey: a lower bound. Empty: none, the signal fraction is negative.",
}
_QUANTILES = ("q0", "q25", "q50", "q75", "q100")
_SPECTRA = {
    "Momentum over gradient": (
        {
            "filter_ratio_top": "largest singular value",
            "filter_ratio_middle": "middle of the spectrum",
            "filter_ratio_rank": "at the rank that is watched",
        },
        "Singular values of the momentum divided by the gradient's: averaging leaves all of a constant signal and "
        "0.16 of noise (at momentum 0.95); good is a largest value above the rest.",
    ),
    "Stable rank": (
        {"stable_rank_gradient": "gradient", "stable_rank_momentum": "momentum"},
        "The number of directions that carry the matrix; good is a momentum that does not fall to 1, where one "
        "direction is all.",
    ),
    "Alignment with the next gradient": (
        {
            "alignment_momentum": "polar factor of the momentum",
            "alignment_gradient": "polar factor of the gradient",
            "alignment_polar_average": "average of the gradients' polar factors",
        },
        "How far a direction agrees with the gradient of the next step: 1 is the best, below 0 it leads uphill; where "
        "the momentum's is above the gradient's, averaging helps.",
    ),
    "Change of the leading subspace": (
        {"subspace_change_left": "left", "subspace_change_right": "right"},
        "0: the leading singular vectors stayed; 1: one of them is new. Good is a low curve: what the momentum "
        "averages still holds.",
    ),
    "Unlifted share": (
        {"unlifted_share_gradient": "gradient", "unlifted_share_momentum": "momentum"},
        "The share of singular values below 0.003 of the Frobenius norm, which Newton-Schulz cannot lift to 1; good is "
        "below 0.1.",
    ),
    "Orthogonality error": (
        {"orthogonality_error": "after Newton-Schulz"},
        "How far the update is from orthogonal; good is a low curve that does not rise.",
    ),
}
_CLAMPS = {
    "at_lower_clamp": "at the lower clamp",
    "at_upper_clamp": "at the upper clamp",
    "at_cap": "bounded by max_step",
}


def layers_section(runs: Sequence[Run]) -> Section:
    """Heat maps of the runs with the lowest loss."""
    section, missing = Section("Layers"), []
    with_maps = [run for run in runs if any(tag.split("/")[0] in _tags() for tag in run.curves)][:MOST]
    for title, reading in _LAYERS.items():
        figures = [
            (run, figure)
            for run in with_maps
            if (figure := heat_map(run, reading, _CELLS // len(with_maps))) is not None
        ]
        for run, figure in figures:
            heading = f"{title[0].upper()}{title[1:]}, {run.name}"
            section.drawings.append(Drawing(heading, _LAYERS_SAY[title], figure, folded=run is not figures[0][0]))
        if not figures:
            missing.append(title)
    if missing:
        section.lines.append(
            f"Not logged by any run: {', '.join(missing)} (OptimizerCallback or ReadingLog logs them)."
        )
    if section.drawings:
        shown = f"the {len(with_maps)} runs with the lowest loss that logged them" if len(runs) > 1 else "the run"
        section.lines.append(
            f"Heat maps are of {shown}. From above: matrices by what they do, then by depth. Cells are means over the "
            "steps of a column."
        )
        rows = [[run.name, *_newest_of_layers(run)] for run in runs]
        section.table = Table(["last median", *_LAYERS], rows)
    return section


def _tags() -> list[str]:
    return [reading.tag + kind for reading in _LAYERS.values() for kind in reading.kinds]


def _newest_of_layers(run: Run) -> list[str]:
    """The last medians; no noise scale where the last signal fraction has none, since it is negative."""
    scale, signal, noise = (_newest(run, reading) for reading in _LAYERS.values())
    return [scale[1], signal[1], noise[1] if noise[0] >= signal[0] else "-"]


def _newest(run: Run, reading: Reading) -> tuple[int, str]:
    """The step and the words of the last median that was logged of any kind."""
    found = {kind: run.curves.get(f"{reading.tag}{kind}/median") for kind in reading.kinds}
    last = {kind: (int(curve.steps[-1]), float(curve.values[-1])) for kind, curve in found.items() if curve is not None}
    if not last:
        return -1, "-"
    kind = max(last, key=last.__getitem__)
    return last[kind][0], BOUNDS.get(kind, "") + as_number(last[kind][1])


def spectra_section(runs: Sequence[Run]) -> Section:
    """Singular values of gradient and momentum, and what follows from them."""
    section = Section("Spectra")
    if fan := _fan(runs):
        section.drawings.append(fan)
    readings = {tag: title for tags, _ in _SPECTRA.values() for tag, title in tags.items()}
    for heading, (tags, caption) in _SPECTRA.items():
        panels = [Panel(title, functools.partial(over_matrices, reading=tag)) for tag, title in tags.items()]
        if (figure := lines(runs, panels, height=170)) is not None:
            section.drawings.append(Drawing(heading, caption, figure))
    if section.drawings:
        section.lines.append("Medians over the matrices of a run.")
        section.table = _last_medians(runs, readings)
    missing = [tag for tag in readings if all(over_matrices(run, tag) is None for run in runs)]
    if missing:
        all_of_them = len(missing) == len(readings) and not section.drawings
        what = "spectra of gradient and momentum" if all_of_them else ", ".join(missing)
        section.lines.append(f"Not logged by any run: {what} (the callback SpectralMonitor logs them).")
    return section


def _quantiles(run: Run, of: str) -> list[Curve]:
    found = [over_matrices(run, f"sigma_{of}_{quantile}") for quantile in _QUANTILES]
    return [curve for curve in found if curve is not None] if None not in found else []


def _fan(runs: Sequence[Run]) -> Drawing | None:
    """The quantiles of the singular values of gradient and momentum."""
    colors = colors_of(runs)
    runs = [run for run in runs if _quantiles(run, "gradient") or _quantiles(run, "momentum")][:_FANS]
    parts = [of for of in ("gradient", "momentum") if any(_quantiles(run, of) for run in runs)]
    if not parts:
        return None
    figure = stacked([f"singular values of the {of}" for of in parts], "step")
    points = points_of(len(runs))
    for row, of in enumerate(parts, start=1):
        for run in runs:
            color = colors[run.name]
            for quantile, curve in zip(_QUANTILES, _quantiles(run, of), strict=False):
                band = {"fill": "tonexty", "fillcolor": _faint(color)} if quantile in ("q50", "q75") else {}
                width = {"q50": 2.0}.get(quantile, 0.7)
                x, y = (binned(part, points) for part in (curve.steps.astype(float), curve.values))
                style = {"color": color, "width": width, "dash": "dot" if quantile in ("q0", "q100") else "solid"}
                figure.add_trace(line(run.name, x, y, color, line=style, **band), row=row, col=1)
        figure.update_yaxes(type="log", exponentformat="power", row=row, col=1)
    caption = (
        "The median (thick), the middle half (band) and the extremes (dotted) of a matrix's singular values, of at "
        f"most {_FANS} runs with the lowest loss; good is a momentum whose small values stay within a factor of 300 of "
        "its large."
    )
    return Drawing("Spectra over time", caption, styled(figure, 90 + 240 * len(parts)))


def _faint(color: str) -> str:
    red, green, blue = hex_to_rgb(color) if color.startswith("#") else unlabel_rgb(color)
    return f"rgba({red:.0f},{green:.0f},{blue:.0f},0.18)"


def clamps_section(runs: Sequence[Run]) -> Section:
    """How often bounds held, and steps that were skipped."""
    section = Section("Clamps and skipped steps")
    panels = [Panel(title, functools.partial(over_matrices, reading=tag), share=True) for tag, title in _CLAMPS.items()]
    if (figure := lines(runs, panels, height=170)) is not None:
        caption = "Shares of columns (NAMO-D) and of steps, medians over matrices; good is well below 1 at each bound."
        section.drawings.append(Drawing("Shares at bounds", caption, figure))
        section.table = _last_medians(runs, _CLAMPS)
    missing = [tag for tag in _CLAMPS if all(over_matrices(run, tag) is None for run in runs)]
    of_most = functools.partial(over_matrices, reading="skipped_steps", aggregate="max")
    if (figure := lines(runs, [Panel("skipped steps", of_most, share=True)])) is not None:
        caption = "Of the matrix with the most, since the optimizer was made; good is a flat line at 0."
        section.drawings.append(Drawing("Skipped steps", caption, figure))
    else:
        missing.append("skipped_steps")
    if missing:
        section.lines.append(
            f"Not logged by any run: {', '.join(missing)} (OptimizerCallback or ReadingLog logs them)."
        )
    return section


def _last_medians(runs: Sequence[Run], tags: Iterable[str]) -> Table:
    """The last median over matrices of each reading that was logged, by run."""
    found = {(run.name, tag): over_matrices(run, tag) for run in runs for tag in tags}
    shown = [tag for tag in tags if any(found[run.name, tag] is not None for run in runs)]
    rows = []
    for run in runs:
        last = [found[run.name, tag] for tag in shown]
        rows.append([run.name, *("-" if curve is None else as_number(float(curve.values[-1])) for curve in last)])
    return Table(["last median", *shown], rows)
