"""Where the local shard of a parameter is in its matrix.

Two words are kept apart. The *stored* matrix is the parameter flattened from dimension 1, ``(shape[0], rest)``, as
torch lays it out and as the parallel strategies cut it. The *true* matrix has output features as rows and input
features as columns; it is the transpose of the stored one where ``transposed`` is set (Hugging Face's ``Conv1D``,
transposed convolutions), and several matrices stacked by rows where ``blocks`` is set (fused q/k/v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_namo.sharding.local import sum_of_squares
from lightning_namo.workspace import Workspace


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of the stored matrix: rows ``[row, row_end)`` and columns ``[col, col_end)``.

    Whole parameters and shards of FSDP2 and tensor parallelism are rectangles. The local tensor keeps its dimensions.
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
class FlatRange:
    """A range ``[start, stop)`` of the flattened stored matrix with ``width`` columns: the shard of FSDP1.

    The local tensor is one-dimensional. In calculations the range is padded with zeros to whole rows.
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
        """First row of which the range has an element."""
        return self.start // self.width

    @property
    def row_end(self) -> int:
        """One past the last row of which the range has an element."""
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
        """Ranges (K, ...) padded with zeros to whole rows, (K, row_end - row, width)."""
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


ShardRegion = Rectangle | FlatRange


def stored_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the stored matrix of a parameter with the given full shape."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


@dataclass(frozen=True)
class Layout:
    """The true matrices of one parameter, and the local part of them.

    Args:
        shape: Full shape of the parameter as stored.
        region: The local part of the stored matrix.
        transposed: Whether the stored matrix is the transpose of the true one.
        blocks: Row counts of the true matrices stacked in the parameter; a single count: a whole matrix.
    """

    shape: tuple[int, ...]
    region: ShardRegion
    transposed: bool
    blocks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        region: ShardRegion,
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
            local: Tensors (K, ...) that are laid out like the local shard.
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

    def expand_to_shard(self, statistic: Tensor, per_column: bool, local_shape: torch.Size) -> Tensor:
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

    def reduce_from_shard(self, local: Tensor, per_column: bool) -> Tensor:
        """The inverse of `expand_to_shard` for statistics >= 0: zeros where this shard has no element.

        Args:
            local: Statistics (K, ...), expanded to tensors that are laid out like the local shard.
            per_column: As given to `expand_to_shard`.

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
        """Rows and columns of the true matrix that the local rectangle spans."""
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
