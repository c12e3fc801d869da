"""What the singular values and directions of gradients and momentum say, and how well O is orthogonal.

Whole matrices on the device, one at a time; what follows from their singular values is computed on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
import torch
from torch import Tensor

UNLIFTED = 0.003
"""Of the Frobenius norm: Newton-Schulz iterations of five steps leave smaller singular values small."""

QUANTILES = (0, 25, 50, 75, 100)

_EXACT = 1e-7  # of the largest singular value: what the Gram square's eigenvalues, in float64, tell from 0


class Decomposition:
    """Singular values and vectors of one matrix (m, n), by the eigenvectors of the smaller of its Gram squares.

    Exact to 1e-7 of the largest singular value. It takes the memory of the matrix in float64 and of four such Gram
    squares, and as long as an SVD of a square matrix, a fifth of that of 768 x 3072. (torch's randomized SVD is faster
    still, but in noise, where there is no gap, its leading vectors are not the leading ones:
    examples/benchmarks/spectra.py.)

    Args:
        matrix: Finite.

    Attributes:
        values: Singular values, (min(m, n),), the largest first; 0 where they are less than 1e-7 of that.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._is_tall = matrix.shape[0] > matrix.shape[1]
        self._wide = _wide(matrix)
        squares, vectors = torch.linalg.eigh(self._wide @ self._wide.mT)
        values = squares.clamp(min=0).sqrt().flip(0)
        self._is_there = values > _EXACT * values[0]
        self.values, self._vectors = values * self._is_there, vectors.flip(1)

    def polar(self) -> Tensor:
        """The polar factor, (m, n), on the row space."""
        inverse = torch.where(self._is_there, 1 / self.values, 0)
        wide = (self._vectors * inverse) @ (self._vectors.mT @ self._wide)
        return cast(Tensor, wide.mT if self._is_tall else wide)

    def leading(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """The first left and right singular vectors, (m, rank) and (n, rank); NaN if not so many values are above 0.

        None where that is no part of the matrix's directions.
        """
        if rank >= len(self.values):
            return None
        short = self._vectors[:, :rank]
        long = (self._wide.mT @ short) / self.values[:rank]
        sides = (long, short) if self._is_tall else (short, long)
        left, right = (torch.where(self._is_there[rank - 1], side, math.nan) for side in sides)
        return left, right


def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values, ()."""
    wide = _wide(matrix)
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares.clamp(min=0).sqrt().sum()


def subspace_error(found: Tensor, expected: Tensor) -> Tensor:
    """``sqrt(1 - sigma_min(A^T B)^2)``, the sine of the largest angle between the spans of orthonormal columns, ()."""
    outside = expected - found @ (found.mT @ expected)
    known = outside.isfinite().all()
    sine: Tensor = torch.linalg.matrix_norm(torch.where(known, outside, 0), 2)
    return torch.where(known, sine.clamp(max=1), math.nan)


def workable(matrix: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def _wide(matrix: Tensor) -> Tensor:
    matrix = workable(matrix)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonality_error(factor: Tensor) -> Tensor:
    """``||O O^T - I||_F / sqrt(r)`` of a matrix, or of O^T O where it is tall, (); NaN of zeros."""
    wide = _wide(factor)
    gram = wide @ wide.mT
    gram.diagonal().sub_(1)
    return torch.where(wide.any(), torch.linalg.matrix_norm(gram) / math.sqrt(len(wide)), math.nan)


@dataclass(frozen=True)
class Measured:
    """Numbers of one matrix beside its singular values; NaN where there is none.

    Attributes:
        alignment_momentum: Of the momentum's polar factor with the next gradient, which is not in it.
        alignment_gradient: Of the gradient's polar factor.
        alignment_polar_average: Of the momentum itself, where that averages polar factors.
        subspace_change_left: Sine of the largest angle by which the momentum's leading left singular vectors have
            turned since the last reading.
        subspace_change_right: And the right ones.
        orthogonality_error: ``||O O^T - I||_F / sqrt(r)`` of the O that the optimizer stepped along.
    """

    alignment_momentum: float = math.nan
    alignment_gradient: float = math.nan
    alignment_polar_average: float = math.nan
    subspace_change_left: float = math.nan
    subspace_change_right: float = math.nan
    orthogonality_error: float = math.nan


NUMBERS = tuple(field.name for field in fields(Measured))


@dataclass(frozen=True)
class Spectra:
    """A reading of one matrix.

    Attributes:
        gradient: Singular values of G, (k,), the largest first; NaN where it was not finite or not there.
        momentum: Of M after the step that G is in; NaN where no momentum is kept.
        measured: Other numbers.
        rank: Of the part that is taken for signal.
        averages_gradients: Whether M does, and is in G's units.
    """

    gradient: np.ndarray
    momentum: np.ndarray
    measured: Measured
    rank: int
    averages_gradients: bool = True

    def numbers(self) -> dict[str, float]:
        """All that is known, by name."""
        found = vars(self.measured).copy()
        for name, singular in {"gradient": self.gradient, "momentum": self.momentum}.items():
            if not np.isfinite(singular).all() or not singular[0]:
                continue
            quantiles = np.percentile(singular, QUANTILES)
            found |= {f"sigma_{name}_q{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
            relative = singular.astype(np.float64) / singular[0]
            found[f"stable_rank_{name}"] = float(relative @ relative)
            found[f"unlifted_share_{name}"] = float(np.mean(relative < UNLIFTED * np.linalg.norm(relative)))
            if self.rank < len(singular):
                found[f"spectral_gap_{name}"] = float(singular[self.rank - 1] - singular[self.rank])
        if self.averages_gradients:
            places = {"top": 0, "rank": self.rank - 1, "middle": len(self.gradient) // 2}
            for name, k in places.items():
                if k < len(self.gradient) and self.gradient[k]:
                    found[f"filter_ratio_{name}"] = float(self.momentum[k] / self.gradient[k])
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def relative(self, name: str) -> np.ndarray:
        """Common logarithms of the singular values over the Frobenius norm, where they are not 0."""
        values = {"gradient": self.gradient, "momentum": self.momentum}[name].astype(np.float64)
        if not np.isfinite(values).all() or not values[0]:
            return values[:0]
        relative = values / values[0]
        logarithms: np.ndarray = np.log10(relative[relative > 0] / np.linalg.norm(relative))
        return logarithms
