"""How steps of the iteration are composed, and the floating-point operations that they take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lightning_namo.polar.coefficients import Coefficients, Triple, newton_schulz_polynomials

_SMALLEST_SQUARE = 64  # short side from which on steps are computed on the Gram square
_SMALLEST_SQUARE_OF_THREE = 512  # short side from which on three steps are composed
_GROWTH_OF_THREE = 45.0  # if their a1 a2 a3 is no larger; the quintic's is 41


def segment_lengths(polynomials: Sequence[Triple], short: int, long: int) -> tuple[int, ...]:
    """How many steps are composed on the Gram square before it is computed anew: 3, 2, 1, ... or 2, 1, ... or 1, ...

    Rounding errors of the square grow by a^2 in each step until then. Measured in bfloat16 on spectra from flat
    to k^-2, random and low-rank matrices: these lengths have 0.5 to 0.97 of the error of the plain iteration, which
    rounds after every product and sum. Two pairs in a row, three steps in squares below 512 or of Polar Express, or
    squares below 64 can have more. (For exactly flat spectra, where the error is that of a single number, it is 0.6
    on average over sizes.)
    """
    pays = short >= _SMALLEST_SQUARE and flops(short, long, (2,)) < flops(short, long, (1, 1))
    growth = math.prod(a for a, _, _ in polynomials[:3])
    three = short >= _SMALLEST_SQUARE_OF_THREE and growth <= _GROWTH_OF_THREE
    pattern = itertools.cycle((1,) if not pays else (3, 2, 1) if three else (2, 1))
    lengths, left = [], len(polynomials)
    while left:
        lengths.append(min(next(pattern), left))
        left -= lengths[-1]
    return tuple(lengths)


def flops(short: int, long: int, lengths: Sequence[int]) -> int:
    """Each length costs the Gram square, one product on the matrix, and 4 k - 3 products of squares for k steps."""
    return sum(2 * short * short * (2 * long + (4 * k - 3) * short) for k in lengths)


def newton_schulz_flops(shape: tuple[int, int], ns_steps: int, ns_coefficients: Coefficients = "quintic") -> int:
    """Floating-point operations (two per multiply-add) of the iteration on one matrix (m, n).

    With r = long / short and in units of 2 short^3, k steps cost 2 r + 4 k - 3 by way of the Gram square, and
    k (2 r + 1) on the matrix: the square pays from r = 1.5 on. Five steps cost 10 r + 5 below; above 6 r + 11, and
    4 r + 14 for the quintic from 512 on. Symmetric products count in full, of which a CPU computes 5/8 from 768 on.
    """
    short, long = sorted(shape)
    return flops(short, long, segment_lengths(newton_schulz_polynomials(ns_coefficients, ns_steps), short, long))
