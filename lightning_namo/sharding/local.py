"""Local shards: the local tensor and gradient of a parameter, stacks of them, sums of squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_namo.workspace import Workspace

_LONG_ROW = 16384  # elements; up to here a row's sum is within 4e-6


def local_tensor(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stack(tensors: Sequence[Tensor], workspace: Workspace) -> Tensor:
    """Tensors of one shape as one (K, ...): a view of a single one, else a copy in the workspace's frame."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    return torch.stack(list(tensors), out=workspace.take((len(tensors), *first.shape), first.dtype, first.device))


def unstack(stacked: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a changed `stack` back; a single tensor of its dtype was changed in place."""
    if len(tensors) > 1 or stacked.dtype != tensors[0].dtype:
        torch._foreach_copy_(list(tensors), list(stacked.unbind()))


def refuse_sparse(name: str, grad: Tensor) -> None:
    """Raise a ValueError for a sparse gradient."""
    if grad.layout != torch.strided:
        raise ValueError(f"Expected a dense gradient but {name} has a {grad.layout} one. Use sparse=False.")


def local_gradient(name: str, parameter: Tensor) -> Tensor | None:
    """The gradient's local shard, laid out like the parameter's; None if there is no gradient.

    A gradient in another layout (the partial sums of a replicated parameter) is replaced by one in the parameter's.

    Raises:
        ValueError: For a sparse gradient.
    """
    grad = parameter.grad
    if grad is None:
        return None
    refuse_sparse(name, grad)
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad = grad.redistribute(placements=parameter.placements)
    return local_tensor(grad)


def sum_of_squares(tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """``||X||_F^2`` of K tensors (K, ...), shape (K,), row by row and then over the rows.

    In one go torch's kernel for the CPU adds up in a chain, whose float32 rounding grows with the tensor: 4e-5 of the
    norm of 768 x 3072 elements, 5e-3 of that of 4096 x 16384, and another one for each way to shard it.
    """
    if tensors.dim() > 2 and tensors[0, :1].numel() > _LONG_ROW:
        tensors = tensors.flatten(1)
    if tensors.dim() > 2:
        rows = torch.linalg.vector_norm(tensors, dim=tuple(range(2, tensors.dim())), dtype=dtype)
        return cast(Tensor, rows).square().sum(dim=1)
    whole = tensors.shape[1] - tensors.shape[1] % 1024
    rows = torch.linalg.vector_norm(tensors[:, :whole].reshape(len(tensors), -1, 1024), dim=2, dtype=dtype)
    rest = torch.linalg.vector_norm(tensors[:, whole:], dim=1, dtype=dtype)
    return cast(Tensor, rows.square().sum(dim=1) + rest.square())
