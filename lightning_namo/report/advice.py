"""What follows from the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from lightning_namo.report.events import Curve
from lightning_namo.report.readings import of_matrices
from lightning_namo.report.runs import TRAIN, VAL, Run
from lightning_namo.report.table import skipped_steps
from lightning_namo.report.valleys import Valley, valleys
from lightning_namo.telemetry.noise import noise_scale
from lightning_namo.telemetry.reading_log import Number, median

MOST = 6
"""Runs whose matrices are spoken of."""

APART = 4.0  # times the batch
UNLIFTED = 0.1  # of a matrix's singular values
MEDIAN = "the median of all matrices"
_LAST = 10  # readings of which the median is taken
_NAMED, _FIRST = 3, 2  # runs, and matrices of each

_SIGNALS = {"signal_fraction": "value", "signal_fraction_at_most": "at_most", "signal_fraction_negative": "negative"}
_SCALES = {"signal_fraction": "noise_scale", "signal_fraction_at_most": "noise_scale_at_least"}


def advice(runs: Sequence[Run]) -> list[str]:
    """Sentences, each with what to do; none where nothing follows. Runs are in the order of their loss."""
    found = [*_not_finite(runs), *_skipped(runs)]
    found += [words for sweep in valleys(runs) for words in _edge(sweep)]
    for matrices_of, words in _OF_MATRICES.items():
        known = [run for run in runs if any(tag.startswith(_READ[matrices_of]) for tag in run.curves)]
        said = {run.name: named for run in known[:MOST] if (named := matrices_of(run))}
        if said:
            looked_at = f" (Of {len(known)} runs, the {MOST} with the lowest loss.)" if len(known) > MOST else ""
            found.append(words.format(_named(list(said), said)) + looked_at)
    return found


def _not_finite(runs: Sequence[Run]) -> list[str]:
    from_step = {}
    for run in runs:
        curves = [run.curves[tag] for tag in (TRAIN, VAL) if tag in run.curves]
        bad = [~np.isfinite(curve.values) for curve in curves]
        if any(each.any() for each in bad):
            first = min(int(curve.steps[each][0]) for curve, each in zip(curves, bad, strict=True) if each.any())
            count, logged = sum(int(each.sum()) for each in bad), sum(len(each) for each in bad)
            from_step[run.name] = f"{count:,} of {logged:,} times it was logged, first at step {first:,}"
    if not from_step:
        return []
    return [
        f"The loss is not finite in {_named(list(from_step), from_step)}. Lower the learning rate or clip gradients."
    ]


def _skipped(runs: Sequence[Run]) -> list[str]:
    counts = {run.name: count for run in runs if (count := skipped_steps(run))}
    if not counts:
        return []
    most_first = sorted(counts, key=lambda name: -counts[name])
    return [
        f"Steps were skipped in {_named(most_first, {name: f'{count:,.0f} steps' for name, count in counts.items()})}: "
        "their gradients were not finite. A few are normal under float16; with more, look for the matrix whose "
        "skipped_steps rise first."
    ]


def _edge(sweep: Valley) -> list[str]:
    rates, best = list(sweep.by_rate), sweep.best()
    tried = [*rates, *sweep.without]
    if len(rates) < 2 or best not in (min(tried), max(tried)) or not sweep.is_alike:
        return []
    where, beyond = ("lowest", "lower") if best == min(tried) else ("highest", "higher")
    return [f"Learning rates, {sweep.name}: the best, {best:g}, is the {where} that was tried. Try {beyond} ones."]


def _signals(run: Run) -> dict[str, Number]:
    """The median signal fraction of each matrix over its last readings, and whether it is a bound."""
    readings: dict[str, list[tuple[int, float, str]]] = {}
    single = any(of_matrices(run, tag) for tag in _SIGNALS)  # else only the median over matrices was logged
    for tag, kind in _SIGNALS.items():
        medians = {MEDIAN: run.curves[f"{tag}/median"]} if f"{tag}/median" in run.curves else {}
        for matrix, curve in (of_matrices(run, tag) if single else medians).items():
            readings.setdefault(matrix, []).extend(
                (int(step), float(value), kind)
                for step, value in zip(curve.steps[-_LAST:], curve.values[-_LAST:], strict=True)
            )
    return {matrix: median(sorted((v, kind) for _, v, kind in sorted(of)[-_LAST:])) for matrix, of in readings.items()}


def batch_of(run: Run) -> float | None:
    """Samples in a step: B = noise_scale rho / (1 - rho), from what was logged at the same steps."""
    for signal, scale in _SCALES.items():
        for tag in run.curves:
            other = run.curves.get(tag.replace(signal, scale, 1)) if tag.startswith(f"{signal}/") else None
            if (
                other is not None
                and tag.rpartition("/")[2] not in ("min", "max")
                and (found := _batches(run.curves[tag], other))
            ):
                return statistics.median(found)
    return None


def _batches(signal: Curve, scale: Curve) -> list[float]:
    _, of_signal, of_scale = np.intersect1d(signal.steps, scale.steps, return_indices=True)
    rho, noise = signal.values[of_signal[-_LAST:]], scale.values[of_scale[-_LAST:]]
    usable = (rho > 0) & (rho < 1)
    found: list[float] = (noise[usable] * rho[usable] / (1 - rho[usable])).tolist()
    return found


def _noise_scales(run: Run) -> tuple[float, dict[str, Number]]:
    """The batch, and the noise scale of each matrix that has one."""
    batch = batch_of(run) or math.nan
    found = {m: (rho, kind) for m, (rho, kind) in _signals(run).items() if kind != "negative" and rho > 0}
    return batch, {m: (noise_scale(rho, batch), kind) for m, (rho, kind) in found.items()}


def _noisy(run: Run) -> str:
    batch, scales = _noise_scales(run)
    if _swinging(run):
        return ""  # a scale needs a signal
    noisy = sorted((m for m in scales if scales[m][0] > APART * batch), key=lambda m: -scales[m][0])
    bounds = {m: "at least " * (scales[m][1] != "value") for m in noisy}
    return _matrices(noisy, len(_signals(run)), {m: f"{bounds[m]}{scales[m][0]:,.0f}" for m in noisy}, batch)


def _clear(run: Run) -> str:
    batch, scales = _noise_scales(run)
    if _swinging(run):
        return ""
    far = [m for m in scales if scales[m][0] < batch / APART and scales[m][1] == "value"]
    clear = sorted(far, key=lambda m: scales[m][0])
    return _matrices(clear, len(_signals(run)), {m: f"{scales[m][0]:,.2g}" for m in clear}, batch)


def _swinging(run: Run) -> str:
    signals = _signals(run)
    swinging = [m for m, (_, kind) in signals.items() if kind == "negative"]
    if swinging == [MEDIAN]:
        return MEDIAN
    return f"{len(swinging)} of {len(signals)} matrices" if 2 * len(swinging) > len(signals) else ""


def _unlifted(run: Run) -> str:
    shares = {m: float(np.median(c.values[-_LAST:])) for m, c in of_matrices(run, "unlifted_share_momentum").items()}
    if not shares and (logged := run.curves.get("unlifted_share_momentum/median")) is not None:
        median_share = float(np.median(logged.values[-_LAST:]))
        return f"median of all matrices {median_share:.0%}" if median_share > UNLIFTED else ""
    unlifted = sorted((m for m, share in shares.items() if share > UNLIFTED), key=lambda m: -shares[m])
    return _matrices(unlifted, len(shares), {m: f"{shares[m]:.0%}" for m in unlifted})


_OF_MATRICES: dict[Callable[[Run], str], str] = {
    _noisy: "The noise scale is more than 4 times the batch in {}. That is noise, or a signal that turns within the "
    "steps that the momentum averages: measure it with GradientNoiseScale before you enlarge the batch.",
    _clear: "The noise scale is less than a fourth of the batch in {}. A large signal fraction is safe to act on: as "
    "far as these matrices go, smaller batches would do.",
    _swinging: "The signal fraction is negative in {}: gradients of neighbouring steps oppose each other. That "
    "happens at good learning rates, too: compare runs with a lower one. Of the batch it says nothing.",
    _unlifted: "Newton-Schulz cannot lift more than 10% of the momentum's singular values in {}. Take more ns_steps, "
    "or ns_coefficients: polar_express.",
}


_READ: dict[Callable[[Run], str], str] = {
    **dict.fromkeys((_noisy, _clear, _swinging), "signal_fraction"),
    _unlifted: "unlifted_share_momentum",
}
"""What each is found from."""


def _matrices(names: Sequence[str], count: int, said: dict[str, str], batch: float | None = None) -> str:
    """How many matrices, and the first of them."""
    if not names:
        return ""
    if list(names) == [MEDIAN]:
        return f"{MEDIAN}{f', batch {batch:,.0f}' if batch else ''}: {said[MEDIAN]}"
    more = f" and {len(names) - _FIRST} more" if len(names) > _FIRST else ""
    first = ", ".join(f"{name} {said[name]}" for name in names[:_FIRST])
    return f"{len(names)} of {count} matrices{f', batch {batch:,.0f}' if batch else ''}: {first}{more}"


def _named(names: Sequence[str], said: dict[str, str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"{name} ({said[name]})" for name in names[:_NAMED]) + more
