"""Where the local shard of a parameter lies in its matrix.

Two words are kept apart. The *stored* matrix is the parameter flattened from dimension 1, ``(shape[0], rest)``, as
torch lays it out and as the parallel strategies cut it. The *true* matrix has output features as rows and input
features as columns; it is the transpose of the stored one where ``transposed`` is set (Hugging Face's ``Conv1D``,
transposed convolutions), and several matrices stacked by rows where ``blocks`` is set (fused q/k/v).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_namo.workspace import Workspace


@dataclass(frozen=True)
class Block:
    """A rectangle of the stored matrix: rows ``[row, row_end)`` and columns ``[col, col_end)``.

    Whole parameters, FSDP2 and tensor parallelism lie like this. The local tensor keeps its dimensions.
    """

    row: int
    row_end: int
    col: int
    col_end: int

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return (self.row_end - self.row) * (self.col_end - self.col)

    def of(self, full: Tensor) -> Tensor:
        """View of this region in stored matrices ``full`` (..., rows, columns)."""
        return full[..., self.row : self.row_end, self.col : self.col_end]

    def to_rectangle(self, local: Tensor) -> Tensor:
        """Local tensors (K, ...) as (K, row_end - row, col_end - col); a copy only where no view exists."""
        return local.reshape(len(local), self.row_end - self.row, self.col_end - self.col)

    def from_rectangle(self, rectangle: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `to_rectangle`, for tensors that broadcast to the rectangle.

        Args:
            rectangle: (K, rows or 1, columns or 1).
            shape: Of one local tensor.
        """
        whole = rectangle.expand(-1, self.row_end - self.row, self.col_end - self.col)
        return whole.reshape(len(rectangle), *shape)


@dataclass(frozen=True)
class Span:
    """A run ``[start, stop)`` of the flattened stored matrix with ``width`` columns: what FSDP1 leaves on a rank.

    The local tensor is one-dimensional. In calculations the run is padded with zeros to whole rows.
    """

    start: int
    stop: int
    width: int

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return self.stop - self.start

    @property
    def row(self) -> int:
        """First row that the run touches."""
        return self.start // self.width

    @property
    def row_end(self) -> int:
        """One past the last row that the run touches."""
        return max(self.row, -(-self.stop // self.width))

    @property
    def col(self) -> int:
        """First column: the padded rectangle spans all of them."""
        return 0

    @property
    def col_end(self) -> int:
        """One past the last column."""
        return self.width

    def of(self, full: Tensor) -> Tensor:
        """View of this region in contiguous stored matrices ``full`` (..., rows, columns)."""
        return full.flatten(-2)[..., self.start : self.stop]

    def to_rectangle(self, local: Tensor) -> Tensor:
        """Runs (K, ...) padded with zeros to the whole rows they touch, (K, row_end - row, width)."""
        head = self.start - self.row * self.width
        tail = self.row_end * self.width - self.stop if self.numel else 0
        padded = nn.functional.pad(local.flatten(1), (head if self.numel else 0, tail)) if head or tail else local
        return padded.reshape(len(local), self.row_end - self.row, self.width)

    def from_rectangle(self, rectangle: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `to_rectangle`, for tensors that broadcast to the rectangle.

        Args:
            rectangle: (K, rows or 1, columns or 1).
            shape: Of one local tensor.
        """
        head = self.start - self.row * self.width
        full = rectangle.expand(-1, self.row_end - self.row, self.width).flatten(1)
        return full[:, head : head + self.numel].reshape(len(rectangle), *shape)


Region = Block | Span
_LONG_ROW = 16384  # elements; up to here a row's sum is within 4e-6
_MATRIX_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


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

    A gradient that lies otherwise (the partial sums of a replicated parameter) is replaced by one that does not.

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


def is_fsdp2(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP2, whose class then has the module's own two places further on."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Let a module's FSDP2 units show their sharded parameters.

    After a forward pass outside training the root, at least, keeps its whole parameters registered until the next
    backward pass: they have no gradients, and are not the optimizer's.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def shard_counts(module: nn.Module, parameters: Sequence[Tensor]) -> list[int]:
    """Over how many ranks each parameter is cut up; 1 where every rank holds all of it.

    Args:
        module: The parameters' module with its outermost FSDP1 unit, which knows the runs.
        parameters: Parameters of the module.
    """
    counts: dict[Tensor, int] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is not None and handle.uses_sharded_strategy:
            runs = (handle.flat_param, *(handle.flat_param._params or ()))
            counts |= dict.fromkeys(runs, handle.process_group.size())
    for p in parameters:
        if isinstance(p, DTensor):
            counts[p] = math.prod(p.device_mesh.size(i) for i, cut in enumerate(p.placements) if hasattr(cut, "dim"))
    return [counts.get(parameter, 1) for parameter in parameters]


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


def stored_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the stored matrix of a parameter with the given full shape."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def region_of(parameter: Tensor, name: str = "a parameter") -> tuple[tuple[int, ...], Region]:
    """Full shape of a plain or DTensor parameter, and the region that this process holds.

    Raises:
        ValueError: For a placement that is no rectangle of the stored matrix.
    """
    shape = tuple(parameter.shape)
    rows, cols = stored_shape(shape)
    if not isinstance(parameter, DTensor):
        return shape, Block(0, rows, 0, cols)
    placements = parameter.placements
    sharded = {p.dim for p in placements if hasattr(p, "dim")}
    if any(p.is_partial() for p in placements) or any(dim > 1 for dim in sharded):
        raise ValueError(
            f"Expected {name} {shape} to be replicated or sharded over dimension 0 or 1, but its placements are "
            f"{placements}. Shard it over dimension 0 or 1, or route it to AdamW (adamw=...)."
        )
    local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, placements)
    if math.prod(local) == 0:
        return shape, Block(0, 0, 0, 0)
    inner = math.prod(shape[2:])
    row, col = (offset[0] if shape else 0), (offset[1] * inner if len(shape) > 1 else 0)
    return shape, Block(row, row + stored_shape(local)[0], col, col + stored_shape(local)[1])


def part_of(parameter: Tensor, region: Region | None) -> Hashable:
    """What tells apart the parts of a parameter on different ranks; None where nothing of it lies here.

    Args:
        parameter: As the strategy left it; any placement that torch can locate.
        region: The part that lies here, if it is known (under FSDP1 the parameter does not know).
    """
    if not local_tensor(parameter).numel():
        return None
    if region is not None:
        return region
    if not isinstance(parameter, DTensor):
        return "whole"
    shape, mesh, placements = tuple(parameter.shape), parameter.device_mesh, parameter.placements
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local), tuple(offset)


def find_regions(module: nn.Module) -> dict[nn.Parameter, tuple[tuple[int, ...], Region]]:
    """Full shape and local region of every parameter of a module, under whatever strategy it lives.

    Plain parameters are whole; DTensors (FSDP2, HSDP, tensor parallelism) tell by themselves; FSDP1's runs are read
    from its flat parameters, since a one-dimensional run does not know the matrix that it was cut from.

    Raises:
        ValueError: For FSDP1 without ``use_orig_params=True`` or without its outermost unit, or a placement that
            cannot be served.
    """
    regions: dict[nn.Parameter, tuple[tuple[int, ...], Region]] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None or handle.flat_param._params is None:
            continue
        flat = handle.flat_param
        for parameter, info, full in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):  # type: ignore[arg-type]
            shape, (rows, width) = tuple(full), stored_shape(full)
            if parameter.shape == full:
                regions[parameter] = (shape, Block(0, rows, 0, width))
            elif info.intra_param_start_idx is not None and info.intra_param_end_idx is not None:
                run = Span(info.intra_param_start_idx, info.intra_param_end_idx + 1, width)
                regions[parameter] = (shape, run)
            else:
                regions[parameter] = (shape, Span(0, 0, width))
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None) if isinstance(layer, _MATRIX_LAYERS) else None
        lazy = isinstance(weight, nn.parameter.UninitializedParameter)
        if isinstance(weight, nn.Parameter) and not lazy and weight.dim() == 1 and weight not in regions:
            raise ValueError(
                f"Expected {name}.weight to have at least 2 dimensions but it has 1: FSDP cut it to a run, and the "
                "FSDP unit that knows the matrix is outside of the module. Pass the outermost FSDP module."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, FlatParameter):
            raise ValueError(
                f"Expected FSDP with use_orig_params=True, but {name} is a flat parameter: the matrices in it "
                "cannot be told apart. Pass use_orig_params=True to FSDP (Lightning's FSDPStrategy does)."
            )
        if parameter not in regions:
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"Expected {name} to be initialized: run one dummy forward pass first.")
            regions[parameter] = region_of(parameter, name)
    return regions


@dataclass(frozen=True)
class Layout:
    """The true matrices of one parameter, and the local part of them.

    Args:
        shape: Full shape of the parameter as stored.
        region: The local part of the stored matrix.
        transposed: Whether the stored matrix is the transpose of the true one.
        blocks: Row counts of the true matrices stacked in the parameter; one entry: a whole matrix.
    """

    shape: tuple[int, ...]
    region: Region
    transposed: bool
    blocks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        region: Region,
        *,
        transposed: bool,
        blocks: int | Sequence[int],
        name: str,
    ) -> Layout:
        """Layout from a group's keys: ``blocks`` is a number of equal blocks, or their row counts.

        Raises:
            ValueError: If the blocks do not make up the rows of the matrix.
        """
        rows = stored_shape(shape)[1 if transposed else 0]
        counts = (rows // max(blocks, 1),) * blocks if isinstance(blocks, int) else tuple(blocks)
        if sum(counts) != rows or min(counts, default=0) < min(1, rows):
            raise ValueError(
                f"Expected the blocks of {name} {shape} to add up to its {rows} rows but got blocks={blocks}."
            )
        return cls(shape, region, transposed, counts)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix."""
        return stored_shape(self.shape)

    @cached_property
    def matrix_shapes(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of each true matrix."""
        columns = self.stored[0] if self.transposed else self.stored[1]
        return tuple((rows, columns) for rows in self.blocks)

    def matrices(self, full: Tensor) -> tuple[Tensor, ...]:
        """Views (..., m, n) of the true matrices in stored matrices ``full`` (..., rows, columns)."""
        true = full.mT if self.transposed else full
        return torch.split(true, list(self.blocks), dim=-2) if len(self.blocks) > 1 else (true,)

    def store(self, matrices: Sequence[Tensor]) -> Tensor:
        """The contiguous stored matrices made of true ones: the inverse of `matrices`."""
        true = torch.cat(list(matrices), dim=-2) if len(matrices) > 1 else matrices[0]
        return (true.mT if self.transposed else true).contiguous()

    def statistic_shape(self, per_column: bool) -> tuple[int, ...]:
        """Shape of a statistic: () or (n,) for a whole matrix, (k,) or (k, n) for k stacked ones."""
        leading = (len(self.blocks),) if len(self.blocks) > 1 else ()
        return (*leading, self.matrix_shapes[0][1]) if per_column else leading

    def sums_of_squares(
        self, local: Tensor, per_column: bool, dtype: torch.dtype, workspace: Workspace | None = None
    ) -> Tensor:
        """These shards' part of ``||X||_F^2`` (or of ``||X[:, j]||^2``) of each true matrix.

        Args:
            local: Tensors (K, ...) that lie like the local shard.
            per_column: Whether to sum by column.
            dtype: In which to sum.
            workspace: For the squares of single elements.

        Returns:
            K of `statistic_shape`; summed over distinct shards they give the whole matrices'.
        """
        if len(self.blocks) == 1 and not per_column:
            return sum_of_squares(local, dtype)
        true, rows, (col, col_end) = self._true(local)
        columns = self.matrix_shapes[0][1]
        sums = []
        for begin, end in self._block_bounds(rows):
            part = true[:, begin:end]
            if per_column:
                # torch's norm over another dimension than the last is ten times slower on CPUs.
                part = part.to(dtype)
                of_columns = torch.mul(part, part, out=(workspace or Workspace()).like(part)).sum(dim=1)
                missing = (col, columns - col_end)
                sums.append(nn.functional.pad(of_columns, missing) if any(missing) else of_columns)
            else:
                sums.append(sum_of_squares(part, dtype))
        return torch.stack(sums, dim=1).view(len(local), *self.statistic_shape(per_column))

    def spread(self, statistic: Tensor, per_column: bool, local_shape: torch.Size) -> Tensor:
        """Statistics (K, ...) of the true matrices, laid out to broadcast against local shards (K, *local_shape)."""
        if statistic.dim() == 1:
            return statistic.view(-1, *(1 for _ in local_shape))
        (row, row_end), (col, col_end) = self._true_bounds()
        if len(self.blocks) > 1:
            rows = zip(torch.split(statistic, 1, dim=1), self.blocks, strict=True)
            whole = torch.cat([value.expand(-1, count, *value.shape[2:]) for value, count in rows], dim=1)
            statistic = whole[:, row:row_end]
        else:
            statistic = statistic.unsqueeze(1)
        rectangle = statistic[..., col:col_end] if per_column else statistic.unsqueeze(-1)
        return self.region.from_rectangle(rectangle.mT if self.transposed else rectangle, local_shape)

    def collect(self, local: Tensor, per_column: bool) -> Tensor:
        """The inverse of `spread` for statistics that are not negative: zeros where this shard touches nothing.

        Args:
            local: Statistics (K, ...), spread over tensors that lie like the local shard.
            per_column: As given to `spread`.

        Returns:
            K of `statistic_shape`; the largest over all shards is the whole.
        """
        true, rows, cols = self._true(local)
        parts = []
        for begin, end in self._block_bounds(rows):
            part = nn.functional.pad(true[:, begin:end], (cols[0], self.matrix_shapes[0][1] - cols[1], 0, 1))
            parts.append(part.amax(dim=1) if per_column else part.amax(dim=(1, 2)))
        return torch.stack(parts, dim=1).view(len(local), *self.statistic_shape(per_column))

    def _true_bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the true matrix that the local rectangle touches."""
        rows, cols = (self.region.row, self.region.row_end), (self.region.col, self.region.col_end)
        return (cols, rows) if self.transposed else (rows, cols)

    def _true(self, local: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        rectangle = self.region.to_rectangle(local)
        return (rectangle.mT if self.transposed else rectangle, *self._true_bounds())

    def _block_bounds(self, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """Where each block's rows begin and end within the local rows."""
        ends = [sum(self.blocks[: k + 1]) for k in range(len(self.blocks))]
        low, high = rows
        return [
            (min(max(end - size, low), high) - low, min(max(end, low), high) - low)
            for size, end in zip(self.blocks, ends, strict=True)
        ]
