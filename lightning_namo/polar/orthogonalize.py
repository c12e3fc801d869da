"""Polar factors: ``polar(X) = U V^T`` where ``X = U S V^T``, by Newton-Schulz iteration or exactly by SVD."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor

from lightning_namo.polar.coefficients import Coefficients, newton_schulz_polynomials
from lightning_namo.polar.newton_schulz import is_stored_transposed, newton_schulz
from lightning_namo.workspace import Workspace

Method = Literal["newton_schulz", "svd"]


@overload
def orthogonalize(
    matrices: Tensor,
    *,
    method: Method = ...,
    ns_steps: int = ...,
    ns_coefficients: Coefficients = ...,
    dtype: torch.dtype | None = ...,
    workspace: Workspace | None = ...,
) -> Tensor: ...


@overload
def orthogonalize(
    matrices: Sequence[Tensor],
    *,
    method: Method = ...,
    ns_steps: int = ...,
    ns_coefficients: Coefficients = ...,
    dtype: torch.dtype | None = ...,
    workspace: Workspace | None = ...,
) -> list[Tensor]: ...


def orthogonalize(
    matrices: Tensor | Sequence[Tensor],
    *,
    method: Method = "newton_schulz",
    ns_steps: int = 5,
    ns_coefficients: Coefficients = "quintic",
    dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> Tensor | list[Tensor]:
    """Orthogonalize matrices: the nearest semi-orthogonal matrix of each, or Newton-Schulz's approximation of it.

    Args:
        matrices: One matrix (m, n), a batch (B, m, n), or a list of matrices and batches of any shapes; never
            modified. Matrices of one shape in a list are iterated in one batch, and Gram squares of one size
            too.
        method: "newton_schulz" iterates; "svd" gives the exact polar factor, computed in float64. Of a
            rank-deficient matrix "svd" gives the partial isometry, so zero stays zero.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic" (Muon's; singular values land in [0.68, 1.20]), "polar_express" (in
            [0.86, 1.14] for inputs of at least 0.003 of the Frobenius norm), or triples (a, b, c).
        dtype: In which the iteration runs; None: `iteration_dtype` of the device.
        workspace: Memory that is used again, for the iteration and for its results, which are valid until the
            workspace's frame ends. The Frobenius norms of the matrices must then be below 1.8e19 (float64: 1.3e154),
            so that their squares do not overflow. None: new memory, and finite matrices of any norm.

    Returns:
        Tensors of the same shapes and dtypes as the input's, without a gradient; a list for a list. A matrix with a NaN
        or an infinity gives NaN throughout by "newton_schulz", and zeros by "svd"; the others are not affected.

    Raises:
        ValueError: For unknown methods or coefficients, ``ns_steps`` below 1, tensors that are not matrices, or a wrong
            value in the environment variable that `iteration_dtype` reads.

    Example:
        >>> import torch
        >>> O = orthogonalize(torch.eye(3, 5), method="svd")
        >>> torch.equal(O, torch.eye(3, 5))
        True
    """
    if method not in ("newton_schulz", "svd"):
        raise ValueError(f"Expected method to be 'newton_schulz' or 'svd' but got {method!r}.")
    polynomials = newton_schulz_polynomials(ns_coefficients, ns_steps)
    given = [matrix.detach() for matrix in ([matrices] if isinstance(matrices, Tensor) else matrices)]
    for index, matrix in enumerate(given):
        if matrix.dim() not in (2, 3):
            which = "it" if isinstance(matrices, Tensor) else f"matrix {index} of the list"
            raise ValueError(
                f"Expected matrices (m, n) or batches (B, m, n) but {which} has shape {tuple(matrix.shape)}. Flatten "
                "it from dimension 1 on, or leave it out."
            )
    batches, places = _gather(given)
    if method == "svd":
        polar = [_exact_polar(batch) for batch in batches]
    else:
        polar = newton_schulz(batches, polynomials, dtype, workspace)
    results = [polar[batch][row] for batch, row in places]
    return results[0] if isinstance(matrices, Tensor) else results


def _gather(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, int | slice]]]:
    """Batches (B, m, n), one for each shape of single matrices; and of each matrix the batch, and the place in it."""
    batches: list[Tensor] = []
    places: list[tuple[int, int | slice]] = [(0, 0)] * len(matrices)
    by_shape: dict[tuple[torch.Size, torch.dtype, bool], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        if matrix.dim() == 3:
            places[index] = len(batches), slice(None)
            batches.append(matrix)
        else:
            by_shape[matrix.shape, matrix.dtype, is_stored_transposed(matrix)].append(index)
    for (_, _, transposed), indices in by_shape.items():
        for row, index in enumerate(indices):
            places[index] = len(batches), row
        members = [matrices[i].mT if transposed else matrices[i] for i in indices]
        batch = members[0].unsqueeze(0) if len(members) == 1 else torch.stack(members)
        batches.append(batch.mT if transposed else batch)
    return batches, places


def _exact_polar(batch: Tensor) -> Tensor:
    """The polar factor on the row space of each matrix; a matrix that is not finite gives zeros."""
    if batch.numel() == 0:
        return torch.zeros_like(batch)
    finite = batch.isfinite().all(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, batch, 0).double(), full_matrices=False)
    eps = torch.finfo(torch.promote_types(batch.dtype, torch.float32)).eps
    cut = eps * max(batch.shape[-2:]) * s[..., :1]
    return cast(Tensor, (u * (s > cut).unsqueeze(-2)) @ vh).to(batch.dtype)
