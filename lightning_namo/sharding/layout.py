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
from typing import Literal

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
StatisticKind = Literal["matrix", "column", "row"]  # one number for each of these


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

    def statistic_shape(self, kind: StatisticKind) -> tuple[int, ...]:
        """Shape of numbers that are kept of the matrices: () or (n,) or (m,) for a whole one, (k, ...) for k blocks.

        The rows of unequal blocks follow one another, (rows,).
        """
        (m, n), k = self.matrix_shapes[0], len(self.blocks)
        if kind == "row" and len(set(self.blocks)) > 1:
            return (sum(self.blocks),)
        return (*((k,) if k > 1 else ()), *{"matrix": (), "column": (n,), "row": (m,)}[kind])

    def by_block(self, statistic: Tensor, kind: StatisticKind) -> tuple[Tensor, ...]:
        """Views (K, 1 or m, 1 or n), one for each block, of K statistics (K, ...) of `statistic_shape`."""
        K, k = len(statistic), len(self.blocks)
        if kind == "row":
            rows = torch.split(statistic.view(K, sum(self.blocks)), list(self.blocks), dim=1)
            return tuple(part.unsqueeze(2) for part in rows)
        size = self.matrix_shapes[0][1] if kind == "column" else 1
        return torch.split(statistic.view(K, k, size), 1, dim=1)

    def sums_of_squares(
        self, local: Tensor, kind: StatisticKind, dtype: torch.dtype, workspace: Workspace | None = None
    ) -> list[Tensor]:
        """These shards' part of ``||X||_F^2``, or of the squared norms of columns or rows, of each true matrix.

        Args:
            local: Tensors (K, ...) that are laid out like the local shard.
            kind: Over what to sum.
            dtype: In which to sum.
            workspace: For the squares of single elements.

        Returns:
            For each block (K, 1, 1), (K, 1, n) or (K, m, 1); summed over distinct shards they give the whole matrices'.
        """
        if len(self.blocks) == 1 and kind == "matrix":
            return [sum_of_squares(local, dtype).view(-1, 1, 1)]
        true, rows, cols = self._true(local)
        sums = []
        for begin, end, (first, missing) in self._block_bounds(rows):
            part = true[:, begin:end]
            if kind == "matrix":
                sums.append(sum_of_squares(part, dtype).view(-1, 1, 1))
                continue
            # torch's norm over another dimension than the last is ten times slower on CPUs.
            part = part.to(dtype)
            squares = torch.mul(part, part, out=(workspace or Workspace()).like(part))
            of_part = squares.sum(dim=1 if kind == "column" else 2, keepdim=True)
            before, after = (cols[0], self.matrix_shapes[0][1] - cols[1]) if kind == "column" else (first, missing)
            padding = (before, after) if kind == "column" else (0, 0, before, after)
            sums.append(nn.functional.pad(of_part, padding) if before or after else of_part)
        return sums

    def spread(self, numbers: Sequence[Tensor], local_shape: torch.Size) -> Tensor:
        """Numbers of the true matrices, laid out to broadcast against local shards.

        Args:
            numbers: For each block (K, 1 or m, 1 or n).
            local_shape: Of one local shard.

        Returns:
            (K, ...), of as many dimensions as K local shards.
        """
        if len(numbers) == 1 and numbers[0].shape[1:] == (1, 1):
            return numbers[0].view(-1, *(1 for _ in local_shape))
        (row, row_end), (col, col_end) = self._true_bounds()
        if len(self.blocks) > 1:
            whole = [value.expand(-1, count, -1) for value, count in zip(numbers, self.blocks, strict=True)]
            statistic = torch.cat(whole, dim=1)[:, row:row_end]
        else:
            statistic = numbers[0] if numbers[0].shape[1] == 1 else numbers[0][:, row:row_end]
        rectangle = statistic[..., col:col_end] if statistic.shape[2] > 1 else statistic
        return self.region.from_rectangle(rectangle.mT if self.transposed else rectangle, local_shape)

    def collect(self, local: Tensor, kind: StatisticKind) -> Tensor:
        """The inverse of `spread`: zeros where this shard has no element.

        Args:
            local: Statistics, spread over tensors (K, ...) that are laid out like the local shard.
            kind: Of the statistics.

        Returns:
            K of `statistic_shape`; the largest in magnitude over all shards is the whole.
        """
        true, rows, cols = self._true(local)
        parts = []
        for begin, end, missing in self._block_bounds(rows):
            of_rows, of_cols = (0, 1), (cols[0], self.matrix_shapes[0][1] - cols[1])
            if kind == "row":
                of_rows, of_cols = missing, (0, 1)
            part = nn.functional.pad(true[:, begin:end], (*of_cols, *of_rows))
            dims = {"matrix": (1, 2), "column": (1,), "row": (2,)}[kind]
            largest, smallest = part.amax(dim=dims), part.amin(dim=dims)
            parts.append(torch.where(-smallest > largest, smallest, largest).view(len(local), -1))
        return torch.cat(parts, dim=1).view(len(local), *self.statistic_shape(kind))

    def spread_state(self, numbers: Tensor, kind: StatisticKind, shape: torch.Size) -> Tensor:
        """Numbers of `statistic_shape`, laid out like the local shard of that shape."""
        return self.spread(self.by_block(numbers[None], kind), shape)[0].expand(shape)

    def collect_state(self, local: Tensor, kind: StatisticKind) -> Tensor:
        """The inverse of `spread_state`; see `collect`."""
        return self.collect(local[None], kind)[0]

    def _true_bounds(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the true matrix that the local rectangle spans."""
        rows, cols = (self.region.row, self.region.row_end), (self.region.col, self.region.col_end)
        return (cols, rows) if self.transposed else (rows, cols)

    def _true(self, local: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        rectangle = self.region.to_rectangle(local)
        return (rectangle.mT if self.transposed else rectangle, *self._true_bounds())

    def _block_bounds(self, rows: tuple[int, int]) -> list[tuple[int, int, tuple[int, int]]]:
        """Where each block's rows begin and end within the local rows, and how many of it are before and after them."""
        bounds, start, (low, high) = [], 0, rows
        for size in self.blocks:
            first, last = (min(max(row, low), high) for row in (start, start + size))
            missing = (first - start, start + size - last) if last > first else (0, size)
            bounds.append((first - low, last - low, missing))
            start += size
        return bounds
