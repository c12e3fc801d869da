"""Coefficients of the Newton-Schulz iteration, as published.

References:
    Quintic: Keller Jordan, kellerjordan.github.io/posts/muon.
    Polar Express: arXiv 2505.16932.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = Literal["quintic", "polar_express"] | Sequence[float] | Sequence[Sequence[float]]
_SAFETY = 1.01  # Polar Express as published shrinks its argument by this, against overshoot in bfloat16
_PUBLISHED: dict[str, tuple[Triple, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *(
            (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    ),
}


def newton_schulz_polynomials(ns_coefficients: Coefficients, ns_steps: int) -> tuple[Triple, ...]:
    """The triple (a, b, c) of each step of the iteration ``X <- a X + (b A + c A^2) X``, ``A = X X^T``.

    Args:
        ns_coefficients: "quintic", "polar_express", one triple for all steps, or a triple for each; where fewer
            than ``ns_steps`` are given the last is repeated.
        ns_steps: Number of steps, at least 1.

    Raises:
        ValueError: For fewer than one step, an unknown name, or triples that are none or more than ``ns_steps``.
    """
    if ns_steps < 1:
        raise ValueError(f"Expected ns_steps to be at least 1 but got {ns_steps}.")
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in _PUBLISHED:
            raise ValueError(
                f"Expected ns_coefficients to be one of {sorted(_PUBLISHED)} or triples (a, b, c) "
                f"but got {ns_coefficients!r}."
            )
        triples = _PUBLISHED[ns_coefficients][:ns_steps]
    else:
        given = cast("list[object]", list(ns_coefficients))
        rows = [given] if given and all(isinstance(x, (int, float)) for x in given) else given
        if not rows or not all(_is_triple(row) for row in rows) or len(rows) > ns_steps:
            raise ValueError(
                f"Expected ns_coefficients to be 1 to {ns_steps} (ns_steps) triples of finite numbers (a, b, c) "
                f"but got {ns_coefficients!r}."
            )
        triples = tuple(cast(Triple, tuple(float(x) for x in cast(Sequence[float], row))) for row in rows)
    return triples + triples[-1:] * (ns_steps - len(triples))


def _is_triple(row: object) -> bool:
    numbers = isinstance(row, Sequence) and len(row) == 3 and all(isinstance(x, (int, float)) for x in row)
    return (
        numbers
        and not any(isinstance(x, bool) for x in cast(Sequence[float], row))
        and all(map(math.isfinite, cast(Sequence[float], row)))
    )
