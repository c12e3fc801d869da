"""Products of matrices whose result is symmetric."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_SMALLEST_OF_BLOCKS = 768  # short side from which on a CPU computes symmetric products by blocks
_BLOCKS = 4  # of rows: 5/8 of the FLOPs


def symmetric_product(
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
