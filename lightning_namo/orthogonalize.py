"""Polar factors: ``polar(X) = U V^T`` where ``X = U S V^T``, by Newton-Schulz iteration or exactly by SVD.

References:
    Quintic coefficients: Keller Jordan, kellerjordan.github.io/posts/muon.
    Polar Express: arXiv 2505.16932.
    Iterating on the Gram matrix: Dao-AILab, github.com/Dao-AILab/gram-newton-schulz.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Literal, TypeAlias, cast, overload

import torch
from torch import Tensor

from lightning_namo.workspace import Workspace

Method = Literal["newton_schulz", "svd"]
Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = Literal["quintic", "polar_express"] | Sequence[float] | Sequence[Sequence[float]]

ITERATION_DTYPE = "LIGHTNING_NAMO_ITERATION_DTYPE"
"""Environment variable that sets `iteration_dtype`: "bfloat16" or "float32"."""

_ITERATION_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_NORM_EPS = 1e-7  # added to the Frobenius norm before the iteration, as in the official code
_SCALED_LARGEST = 2.0**47  # element of a matrix whose norm overflowed: squared, float32 holds the sum of 2^33 of it
_SMALLEST_SQUARE = 64  # short side from which on steps go by way of the Gram square
_SMALLEST_SQUARE_OF_THREE = 512  # from which on three in a row do
_GROWTH_OF_THREE = 45.0  # if their a1 a2 a3 is no larger; the quintic's is 41
_SMALLEST_OF_BLOCKS = 768  # short side from which on a CPU computes symmetric products by blocks
_BLOCKS = 4  # of rows: 5/8 of the FLOPs
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
            modified. In a list, what has one shape is iterated in one batch, and the squares of all that have one
            short side too.
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
        ValueError: For unknown methods or coefficients, ``ns_steps`` below 1, tensors that are no matrices, or a wrong
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
            which = "it" if isinstance(matrices, Tensor) else f"entry {index}"
            raise ValueError(
                f"Expected matrices (m, n) or batches (B, m, n) but {which} has shape {tuple(matrix.shape)}. Flatten "
                "it from dimension 1 on, or leave it out."
            )
    batches, places = _gather(given)
    if method == "svd":
        polar = [_exact_polar(batch) for batch in batches]
    else:
        polar = _newton_schulz(batches, polynomials, dtype, workspace)
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
            by_shape[matrix.shape, matrix.dtype, _stored_transposed(matrix)].append(index)
    for (_, _, transposed), indices in by_shape.items():
        for row, index in enumerate(indices):
            places[index] = len(batches), row
        members = [matrices[i].mT if transposed else matrices[i] for i in indices]
        batch = members[0].unsqueeze(0) if len(members) == 1 else torch.stack(members)
        batches.append(batch.mT if transposed else batch)
    return batches, places


def _stored_transposed(matrix: Tensor) -> bool:
    return matrix.mT.is_contiguous() and not matrix.is_contiguous()


def _exact_polar(batch: Tensor) -> Tensor:
    """The polar factor on the row space of each matrix; a matrix that is not finite gives zeros."""
    if batch.numel() == 0:
        return torch.zeros_like(batch)
    finite = batch.isfinite().all(dim=(-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, batch, 0).double(), full_matrices=False)
    eps = torch.finfo(torch.promote_types(batch.dtype, torch.float32)).eps
    cut = eps * max(batch.shape[-2:]) * s[..., :1]
    return cast(Tensor, (u * (s > cut).unsqueeze(-2)) @ vh).to(batch.dtype)


def _newton_schulz(
    batches: Sequence[Tensor], polynomials: Sequence[Triple], dtype: torch.dtype | None, workspace: Workspace | None
) -> list[Tensor]:
    """Polar factors of batches (B, m, n), in their dtypes; those of one short side go through the iteration together.

    The transpose's polar factor is the transpose: a batch that is stored transposed is iterated as it lies.
    """
    results = [torch.zeros_like(batch) if batch.numel() == 0 else batch for batch in batches]
    together: dict[tuple[int, tuple[int, ...], torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, batch in enumerate(batches):
        if batch.numel():
            short, long = sorted(batch.shape[-2:])
            working = dtype or iteration_dtype(batch.device.type)
            together[short, _lengths(polynomials, short, long), working, batch.device].append(index)
    for (_, lengths, working, _), indices in together.items():
        turned = [_stored_transposed(batches[i]) for i in indices]
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
    # Outside of the frame the results; the iterates change places with each segment, and end in results.
    results = [_take(workspace, batch.shape, dtype, device) for batch in batches]
    with workspace.frame() if workspace else nullcontext():
        others = [_take(workspace, batch.shape, dtype, device) for batch in batches]
        xs, ys = (results, others) if len(lengths) % 2 == 0 else (others, results)
        for batch, x in zip(batches, xs, strict=True):
            # The optimizers pass a workspace, and matrices whose norms do not overflow: no time is spent on that there.
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
        _symmetric(left, right, out=part)
    for k, (a, b, c) in enumerate(segment):
        _symmetric(gram, gram, gram, beta=b, alpha=c, out=poly)
        if k:
            _symmetric(poly, factor, factor, beta=a, out=spare)
            factor, spare = spare, factor
        if k + 1 < len(segment):
            _symmetric(poly, gram, gram, beta=a, out=spare)
            _symmetric(spare, poly, spare, beta=a, out=gram)
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


def _symmetric(
    left: Tensor, right: Tensor, added: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor
) -> None:
    """``out = beta added + alpha left right`` where that is symmetric: on CPUs its upper blocks, which are mirrored."""
    size = out.shape[-1]
    if out.device.type == "cpu" and size >= _SMALLEST_OF_BLOCKS:
        for k in range(len(out)):  # one by one: a batched product into a part of a matrix goes by way of a copy
            _by_blocks(left[k], right[k], None if added is None else added[k], beta, alpha, out[k])
    elif added is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(added, left, right, beta=beta, alpha=alpha, out=out)


def _by_blocks(left: Tensor, right: Tensor, added: Tensor | None, beta: float, alpha: float, out: Tensor) -> None:
    size = len(out)
    for begin, end in itertools.pairwise(size * k // _BLOCKS for k in range(_BLOCKS + 1)):
        rows, cols, upper = left[begin:end], right[:, begin:], out[begin:end, begin:]
        if added is None:
            torch.mm(rows, cols, out=upper)
        else:
            torch.addmm(added[begin:end, begin:], rows, cols, beta=beta, alpha=alpha, out=upper)
        out[end:, begin:end] = upper[:, end - begin :].mT


def _is_wide(batch: Tensor) -> bool:
    return batch.shape[-2] <= batch.shape[-1]


def _normalize(batch: Tensor, out: Tensor, may_overflow: bool = True) -> None:
    """Divide each matrix by its Frobenius norm.

    Where the square of the norm overflows and all elements are finite, the matrix is first scaled by a power of two,
    which rounds nothing that is left after the division. Other matrices give the same bits with and without
    may_overflow.

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


def _lengths(polynomials: Sequence[Triple], short: int, long: int) -> tuple[int, ...]:
    """How many steps are composed on the Gram square before it is computed anew: 3, 2, 1, ... or 2, 1, ... or 1, ...

    What the square lost to rounding grows by a^2 in each step until then. Measured in bfloat16 on spectra from flat
    to k^-2, random and low-rank matrices: these lengths have 0.5 to 0.97 of the error of the plain iteration, which
    rounds after every product and sum. Two pairs in a row, three steps in squares below 512 or of Polar Express, or
    squares below 64 can have more. (For exactly flat spectra, where the error is that of a single number, it is 0.6
    on average over sizes.)
    """
    pays = short >= _SMALLEST_SQUARE and _flops(short, long, (2,)) < _flops(short, long, (1, 1))
    growth = math.prod(a for a, _, _ in polynomials[:3])
    three = short >= _SMALLEST_SQUARE_OF_THREE and growth <= _GROWTH_OF_THREE
    pattern = itertools.cycle((1,) if not pays else (3, 2, 1) if three else (2, 1))
    lengths, left = [], len(polynomials)
    while left:
        lengths.append(min(next(pattern), left))
        left -= lengths[-1]
    return tuple(lengths)


def _flops(short: int, long: int, lengths: Sequence[int]) -> int:
    """Each length costs the Gram square, one product on the matrix, and 4 k - 3 products of squares for k steps."""
    return sum(2 * short * short * (2 * long + (4 * k - 3) * short) for k in lengths)


def newton_schulz_flops(shape: tuple[int, int], ns_steps: int, ns_coefficients: Coefficients = "quintic") -> int:
    """Floating-point operations (two per multiply-add) of the iteration on one matrix (m, n).

    With r = long / short and in units of 2 short^3, k steps cost 2 r + 4 k - 3 by way of the Gram square, and
    k (2 r + 1) on the matrix: the square pays from r = 1.5 on. Five steps cost 10 r + 5 below; above 6 r + 11, and
    4 r + 14 for the quintic from 512 on. Symmetric products count in full, of which a CPU computes 5/8 from 768 on.
    """
    short, long = sorted(shape)
    return _flops(short, long, _lengths(newton_schulz_polynomials(ns_coefficients, ns_steps), short, long))


def iteration_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where the device has instructions for its products, else float32: in which Newton-Schulz iterates.

    The environment variable LIGHTNING_NAMO_ITERATION_DTYPE, "bfloat16" or "float32", overrules the device. Processes
    that are started later inherit it. Results of the optimizers are communicated in bfloat16 in both cases.

    A CPU without the instructions is slower in bfloat16 than in float32: 1.3 times with AVX-512, 40 times with AVX2
    (measured).

    Args:
        device_type: As in ``torch.device.type``.

    Raises:
        ValueError: If the environment variable has another value.
    """
    name = os.environ.get(ITERATION_DTYPE)
    if not name:
        return _fastest_dtype(device_type)
    if name not in _ITERATION_DTYPES:
        raise ValueError(
            f"Expected the environment variable {ITERATION_DTYPE} to be 'bfloat16' or 'float32', or not to be set. "
            f"Got {name!r}."
        )
    return _ITERATION_DTYPES[name]


@cache
def _fastest_dtype(device_type: str) -> torch.dtype:
    if device_type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device_type == "cpu":
        fast = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    else:
        fast = True
    return torch.bfloat16 if fast else torch.float32
