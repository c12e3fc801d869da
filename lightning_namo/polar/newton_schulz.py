"""The Newton-Schulz iteration on batches of matrices, by way of the Gram matrix.

References:
    Iterating on the Gram matrix: Dao-AILab, github.com/Dao-AILab/gram-newton-schulz.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from lightning_namo.polar.coefficients import Triple
from lightning_namo.polar.cost import segment_lengths
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.polar.symmetric import symmetric_product
from lightning_namo.workspace import Workspace

_NORM_EPS = 1e-7  # added to the Frobenius norm before the iteration, as in the official code
_SCALED_LARGEST = 2.0**47  # element of a matrix whose norm overflowed: squared, float32 holds the sum of 2^33 of it


def is_stored_transposed(matrix: Tensor) -> bool:
    """Whether the transpose of a matrix is contiguous, and the matrix is not."""
    return matrix.mT.is_contiguous() and not matrix.is_contiguous()


def newton_schulz(
    batches: Sequence[Tensor], polynomials: Sequence[Triple], dtype: torch.dtype | None, workspace: Workspace | None
) -> list[Tensor]:
    """Polar factors of batches (B, m, n), in their dtypes; those of one short side go through the iteration together.

    The transpose's polar factor is the transpose: a batch that is stored transposed is iterated without a copy.
    """
    results = [torch.zeros_like(batch) if batch.numel() == 0 else batch for batch in batches]
    together: dict[tuple[int, tuple[int, ...], torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, batch in enumerate(batches):
        if batch.numel():
            short, long = sorted(batch.shape[-2:])
            working = dtype or iteration_dtype(batch.device.type)
            together[short, segment_lengths(polynomials, short, long), working, batch.device].append(index)
    for (_, lengths, working, _), indices in together.items():
        turned = [is_stored_transposed(batches[i]) for i in indices]
        stored = [batches[i].mT if turn else batches[i] for i, turn in zip(indices, turned, strict=True)]
        # Results that are converted are new tensors: the iteration's memory is free for the next matrices.
        converted = all(batches[i].dtype != working for i in indices)
        with workspace.frame() if workspace and converted else nullcontext():
            polar = _iterate(stored, polynomials, lengths, working, workspace)
            for i, turn, result in zip(indices, turned, polar, strict=True):
                results[i] = (result.mT if turn else result).to(batches[i].dtype)
            del polar, result
    return results


def _iterate(
    batches: Sequence[Tensor],
    polynomials: Sequence[Triple],
    lengths: Sequence[int],
    dtype: torch.dtype,
    workspace: Workspace | None,
) -> list[Tensor]:
    """Iterate batches (B, m, n) of one short side: ``X <- p(R) X`` with ``R = X X^T``, or X^T X on the right.

    One step is applied as ``a X + (b R + c R^2) X``. Several are composed on the small square first, which takes R
    along: ``P = a I + b R + c R^2``, ``Q <- P Q``, ``R <- P R P``; then ``Q X`` is one product. Every product adds
    before it rounds. R and the polynomials of R are symmetric.
    """
    sizes, device = [len(batch) for batch in batches], batches[0].device
    short = min(batches[0].shape[-2:])
    # Results are taken outside of the frame. Iterates alternate between results and others, and end in results.
    results = [_take(workspace, batch.shape, dtype, device) for batch in batches]
    with workspace.frame() if workspace else nullcontext():
        others = [_take(workspace, batch.shape, dtype, device) for batch in batches]
        xs, ys = (results, others) if len(lengths) % 2 == 0 else (others, results)
        for batch, x in zip(batches, xs, strict=True):
            # The optimizers pass a workspace and matrices whose norms do not overflow: they skip that check.
            _normalize(batch, out=x, may_overflow=workspace is None)
        squares = _take(workspace, (4, sum(sizes), short, short), dtype, device)
        steps = iter(polynomials)
        for length in lengths:
            _apply(list(itertools.islice(steps, length)), xs, ys, squares, sizes)
            xs, ys = ys, xs
    return results


def _take(workspace: Workspace | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return workspace.take(shape, dtype, device) if workspace else torch.empty(shape, dtype=dtype, device=device)


def _apply(
    segment: Sequence[Triple], xs: Sequence[Tensor], ys: Sequence[Tensor], squares: Tensor, sizes: list[int]
) -> None:
    """One segment of `_iterate`, from xs to ys."""
    gram, poly, factor, spare = squares.unbind()
    for x, part in zip(xs, torch.split(gram, sizes), strict=True):
        left, right = (x, x.mT) if _is_wide(x) else (x.mT, x)
        symmetric_product(left, right, out=part)
    for k, (a, b, c) in enumerate(segment):
        symmetric_product(gram, gram, gram, beta=b, alpha=c, out=poly)
        if k:
            symmetric_product(poly, factor, factor, beta=a, out=spare)
            factor, spare = spare, factor
        if k + 1 < len(segment):
            symmetric_product(poly, gram, gram, beta=a, out=spare)
            symmetric_product(spare, poly, spare, beta=a, out=gram)
        if not k and len(segment) > 1:
            poly.diagonal(dim1=1, dim2=2).add_(a)
        if not k:
            factor, poly = poly, factor
    for x, y, part in zip(xs, ys, torch.split(factor, sizes), strict=True):
        left, right = (part, x) if _is_wide(x) else (x, part.mT)  # X P^T P'^T: rounded factors do not commute
        if len(segment) == 1:
            torch.baddbmm(x, left, right, beta=segment[0][0], out=y)
        else:
            torch.bmm(left, right, out=y)


def _is_wide(batch: Tensor) -> bool:
    return batch.shape[-2] <= batch.shape[-1]


def _normalize(batch: Tensor, out: Tensor, may_overflow: bool = True) -> None:
    """Divide each matrix by its Frobenius norm.

    Where the square of the norm overflows although all elements are finite, the matrix is first multiplied by a power
    of two. That changes only elements that would be zero after the division. Other matrices give the same bits with
    and without may_overflow.

    Args:
        batch: (B, m, n).
        out: The results, (B, m, n).
        may_overflow: Whether the norm may overflow.
    """
    norm = _frobenius_norm(batch, out.dtype)
    if may_overflow:
        largest = torch.linalg.vector_norm(batch, math.inf, dim=(-2, -1), keepdim=True, dtype=norm.dtype)
        overflows = norm.isinf() & largest.isfinite()
        # largest = mantissa * 2^exponent: the scale is a power of two, and neither overflows nor underflows.
        scale = torch.where(overflows, torch.frexp(largest).mantissa * _SCALED_LARGEST / largest, 1)
        batch = batch * scale.to(batch.dtype)
        norm = torch.where(overflows, _frobenius_norm(batch, out.dtype), norm)
    norm = norm + _NORM_EPS
    on_cpu = batch.device.type == "cpu"
    if len(batch) == 1 and on_cpu and out.itemsize <= batch.itemsize:  # no promoted copy: the divisor has no dimensions
        batch, norm, out = batch[0], norm[0, 0, 0], out[0]
    torch.div(batch, norm, out=out)


def _frobenius_norm(batch: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1), summed in at least float32, and in dtype if that is wider (bfloat16 on a CPU: by rows, rounded)."""
    norm_dtype = torch.promote_types(torch.promote_types(batch.dtype, dtype), torch.float32)
    on_cpu = batch.device.type == "cpu"
    if on_cpu and batch.dtype == torch.bfloat16 and batch.shape[-2] >= 64:  # no float32 copy; the roundings average out
        rows = torch.linalg.vector_norm(batch, dim=-1).to(norm_dtype)
        return cast(Tensor, torch.linalg.vector_norm(rows, dim=-1))[:, None, None]
    return cast(Tensor, torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=norm_dtype))
