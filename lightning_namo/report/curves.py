"""Curves, made small enough to be drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS, FEWEST, ALL_POINTS = 500, 50, 5_000  # of a curve, at most, at least where there are more, and of all runs


def points_of(runs: int) -> int:
    """Points that a curve is drawn with at most."""
    return max(FEWEST, min(POINTS, ALL_POINTS // runs))


def binned(values: NDArray[np.float64], points: int) -> NDArray[np.float64]:
    """Means over bins of as equal numbers of values as can be, at most `points` of them."""
    if len(values) <= points:
        return values
    edges = np.linspace(0, len(values), points + 1).astype(int)
    means: NDArray[np.float64] = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
    return means


def smoothed(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Exponential moving average without the bias of its start; not a number where the value is not finite."""
    if not weight:
        return values
    average, total, found = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        if np.isfinite(value):
            average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        found[i] = average / total if np.isfinite(value) else np.nan
    return found
