"""Polar factors: ``polar(X) = U V^T`` where ``X = U S V^T``, by Newton-Schulz iteration or exactly by SVD.

References:
    Quintic coefficients: Keller Jordan, kellerjordan.github.io/posts/muon.
    Polar Express: arXiv 2505.16932.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast, overload

import torch
from torch import Tensor

Method = Literal["newton_schulz", "svd"]
Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = Literal["quintic", "polar_express"] | Sequence[float] | Sequence[Sequence[float]]

_NORM_EPS = 1e-7  # added to the Frobenius norm before the iteration, as in the official code
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
                f"Expected ns_coefficients to be 1 to {ns_steps} (ns_steps) triples of numbers (a, b, c) "
                f"but got {ns_coefficients!r}."
            )
        triples = tuple(cast(Triple, tuple(float(x) for x in cast(Sequence[float], row))) for row in rows)
    return triples + triples[-1:] * (ns_steps - len(triples))


def _is_triple(row: object) -> bool:
    return isinstance(row, Sequence) and len(row) == 3 and all(isinstance(x, (int, float)) for x in row)


@overload
def orthogonalize(
    matrices: Tensor,
    *,
    method: Method = ...,
    ns_steps: int = ...,
    ns_coefficients: Coefficients = ...,
    dtype: torch.dtype = ...,
) -> Tensor: ...
@overload
def orthogonalize(
    matrices: Sequence[Tensor],
    *,
    method: Method = ...,
    ns_steps: int = ...,
    ns_coefficients: Coefficients = ...,
    dtype: torch.dtype = ...,
) -> list[Tensor]: ...
def orthogonalize(
    matrices: Tensor | Sequence[Tensor],
    *,
    method: Method = "newton_schulz",
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "quintic",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor | list[Tensor]:
    """Orthogonalize matrices: the nearest semi-orthogonal matrix of each, or Newton-Schulz's approximation of it.

    Args:
        matrices: One matrix (m, n), a batch (B, m, n), or a list of matrices of any shapes; never modified.
        method: "newton_schulz" iterates; "svd" gives the exact polar factor, computed in float64. Of a
            rank-deficient matrix "svd" gives the partial isometry, so zero stays zero.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic" (Muon's; singular values land in [0.68, 1.20]), "polar_express" (in
            [0.86, 1.14] for inputs of at least 0.003 of the Frobenius norm), or triples (a, b, c).
        dtype: In which the iteration runs.

    Returns:
        Tensors of the same shapes and dtypes as the input's; a list for a list.

    Raises:
        ValueError: For unknown methods or coefficients, ``ns_steps`` below 1, or tensors that are no matrices.

    Example:
        >>> import torch
        >>> O = orthogonalize(torch.eye(3, 5), method="svd")
        >>> torch.equal(O, torch.eye(3, 5))
        True
    """
    if method not in ("newton_schulz", "svd"):
        raise ValueError(f"Expected method to be 'newton_schulz' or 'svd' but got {method!r}.")
    polynomials = newton_schulz_polynomials(ns_coefficients, ns_steps)
    if isinstance(matrices, Tensor):
        if matrices.dim() not in (2, 3):
            raise ValueError(f"Expected a matrix (m, n) or a batch (B, m, n) but got shape {tuple(matrices.shape)}.")
        batch = matrices if matrices.dim() == 3 else matrices.unsqueeze(0)
        return _polar(batch, method, polynomials, dtype).view_as(matrices)

    by_shape: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        if matrix.dim() != 2:
            raise ValueError(f"Expected matrices (m, n) but entry {index} has shape {tuple(matrix.shape)}.")
        by_shape[matrix.shape, matrix.dtype].append(index)
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices in by_shape.values():
        polar = _polar(torch.stack([matrices[i] for i in indices]), method, polynomials, dtype)
        for index, result in zip(indices, polar, strict=True):
            results[index] = result
    return results


def _polar(batch: Tensor, method: Method, polynomials: tuple[Triple, ...], dtype: torch.dtype) -> Tensor:
    """Polar factors of a batch (B, m, n), contiguous and in its dtype."""
    if batch.numel() == 0:
        return torch.zeros_like(batch, memory_format=torch.contiguous_format)
    result = _exact_polar(batch) if method == "svd" else _newton_schulz(batch, polynomials, dtype)
    return result.to(batch.dtype).contiguous()


def _exact_polar(batch: Tensor) -> Tensor:
    """The polar factor on the row space of each matrix; a matrix that is not finite gives zeros."""
    finite = batch.isfinite().all(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, batch, 0).double(), full_matrices=False)
    eps = torch.finfo(torch.promote_types(batch.dtype, torch.float32)).eps
    cut = eps * max(batch.shape[-2:]) * s[..., :1]
    return cast(Tensor, (u * (s > cut).unsqueeze(-2)) @ vh)


def _newton_schulz(batch: Tensor, polynomials: tuple[Triple, ...], dtype: torch.dtype) -> Tensor:
    """Iterate ``X <- a X + (b A + c A^2) X`` with the smaller of ``A = X X^T`` and ``A = X^T X``."""
    # The norm sums in float32 at least; the products accumulate and add before they round to dtype.
    norm_dtype = torch.promote_types(torch.promote_types(batch.dtype, dtype), torch.float32)
    norm = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=norm_dtype)
    x: Tensor = (batch / (norm + _NORM_EPS)).to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    for a, b, c in polynomials:
        gram = x @ x.mT if wide else x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (polynomial, x) if wide else (x, polynomial)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def newton_schulz_flops(shape: tuple[int, int], ns_steps: int) -> int:
    """Floating-point operations (two per multiply-add) of the iteration on one matrix (m, n)."""
    short, long = sorted(shape)
    return ns_steps * 2 * short * short * (2 * long + short)
