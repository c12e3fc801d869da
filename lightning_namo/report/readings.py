"""What was logged of matrices, by name of the reading, and as one number over the matrices."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_namo.report.events import Curve
from lightning_namo.report.runs import Run

AGGREGATES = ("min", "median", "max")


def of_matrices(run: Run, reading: str) -> dict[str, Curve]:
    """The curves of a reading by matrix, in the order they were logged in."""
    curves = {tag.removeprefix(f"{reading}/"): c for tag, c in run.curves.items() if tag.startswith(f"{reading}/")}
    return {matrix: curve for matrix, curve in curves.items() if matrix not in AGGREGATES}


def in_model_order(run: Run, matrices: Iterable[str]) -> list[str]:
    """Matrices as the optimizer has them: it reports the effective step of each from the first step on."""
    return list(dict.fromkeys([m for m in of_matrices(run, "effective_step") if m in set(matrices)] + list(matrices)))


def over_matrices(run: Run, reading: str, aggregate: str = "median") -> Curve | None:
    """The aggregate as it was logged, or else of the single matrices' curves; None where there is neither."""
    if (logged := run.curves.get(f"{reading}/{aggregate}")) is not None:
        return logged
    curves = list(of_matrices(run, reading).values())
    if not curves:
        return None
    of: Callable[[NDArray[np.float64]], NDArray[np.float64]] = functools.partial(getattr(np, f"nan{aggregate}"), axis=0)
    steps, first = np.unique(np.concatenate([curve.steps for curve in curves]), return_index=True)
    values = np.full((len(curves), len(steps)), np.nan)
    for of_matrix, curve in zip(values, curves, strict=True):
        of_matrix[np.searchsorted(steps, curve.steps)] = curve.values
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of a step with nothing but NaN
        return Curve(steps, of(values), np.concatenate([curve.seconds for curve in curves])[first])


def role_and_depth(matrix: str) -> tuple[str, int]:
    """A name without the number of its layer, and that number; -1 where it has none."""
    number = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", matrix)
    if number is None:
        return matrix, -1
    return f"{matrix[: number.start()]}*{matrix[number.end() :]}", int(number[0])


def ordered(matrices: list[str]) -> dict[str, str]:
    """Names by role and then by depth, each with a short label: what all have in common at either end is left out."""
    if not matrices:
        return {}
    roles = list(dict.fromkeys(role_and_depth(matrix)[0] for matrix in matrices))
    by_place = sorted(matrices, key=lambda m: (roles.index(role_and_depth(m)[0]), role_and_depth(m)[1]))
    parts = [role.split(".") for role in roles]
    shortest = min(len(p) for p in parts) - 1
    before = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    after = next((i for i in range(shortest - before) if len({p[-1 - i] for p in parts}) > 1), shortest - before)
    short = {
        role: ".".join(q for q in p[before : len(p) - after] if q != "*") for role, p in zip(roles, parts, strict=True)
    }
    labels = {}
    for matrix in by_place:
        role, depth = role_and_depth(matrix)
        labels[matrix] = short[role] if depth < 0 else f"{short[role]} {depth}".strip()
    return labels if len(set(labels.values())) == len(labels) else {matrix: matrix for matrix in by_place}
