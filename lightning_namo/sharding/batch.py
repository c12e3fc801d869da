"""Parameters that are batches of matrices, such as the experts of a layer, and where the shards of the matrices are.

Such a parameter holds E stored matrices (rows, columns), one after the other. A shard of it has all of some of them,
the same part of each, or, as FSDP1 cuts it, a run that begins and ends within some. The matrices are divided into parts
of consecutive ones, of which each rank holds one region; a part is a unit of ownership and exchange.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_namo.sharding.layout import FlatRange, Layout, Rectangle, ShardRegion, StatisticKind
from lightning_namo.sharding.local import local_tensor

Batched: TypeAlias = bool | int  # True: the matrices are along dimension 0; G: dimension 0 divides into G matrices
_NOTHING = Rectangle(0, 0, 0, 0)


@dataclass(frozen=True)
class Box:
    """A part of a tensor of more than two dimensions: where it begins in each, and its size there."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return math.prod(self.size)

    def of(self, full: Tensor) -> Tensor:
        """View of this part in a contiguous tensor with all elements."""
        part = full.view(self.shape)
        for dim, (offset, size) in enumerate(zip(self.offset, self.size, strict=True)):
            part = part.narrow(dim, offset, size)
        return part


@dataclass(frozen=True)
class _Same:
    """The same part of some of the matrices."""

    first: int
    last: int
    region: Rectangle


@dataclass(frozen=True)
class BatchLayout:
    """The matrices of one batched parameter, and the local part of them.

    Args:
        shape: Full shape of the parameter as stored.
        count: How many matrices it holds, E.
        region: The local part.
        matrix: The layout of one whole matrix, as if it were a parameter of its own.
    """

    shape: tuple[int, ...]
    count: int
    region: ShardRegion | Box
    matrix: Layout

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        region: ShardRegion | Box,
        *,
        batched: Batched,
        transposed: bool,
        blocks: int | Sequence[int],
        name: str,
    ) -> BatchLayout:
        """Layout from a group's keys.

        Raises:
            ValueError: If the parameter holds no such matrices, or is cut in a way that gives no rectangle of them.
        """
        count = shape[0] if batched is True else int(batched)
        is_one = len(shape) > 2 if batched is True else count > 0 and shape[0] % count == 0
        if not is_one:
            raise ValueError(
                f"Expected {name} {shape} to hold matrices along its first dimension, as batched={batched} says, but "
                "it has too few dimensions, or does not divide into so many."
            )
        stored = shape[1:] if batched is True else (shape[0] // count, *shape[1:])
        rows, columns = stored[0], math.prod(stored[1:])
        whole = Layout.of(
            stored, Rectangle(0, rows, 0, columns), transposed=transposed, blocks=blocks, name=f"each matrix of {name}"
        )
        layout = cls(shape, count, region, whole)
        if layout._held is None:
            raise ValueError(
                f"Expected the {count} matrices {stored} of {name} {shape} to be sharded by matrices, rows or columns, "
                f"but this rank holds {region}. Shard it over dimension 0, 1 or 2, or route it to AdamW (adamw=...)."
            )
        return layout

    @cached_property
    def _size(self) -> int:
        return math.prod(self.matrix.stored)

    @cached_property
    def _held(self) -> FlatRange | _Same | None:
        """What this rank holds: a run of all elements, or the same part of some matrices; None: neither."""
        rows, columns = self.matrix.stored
        region, is_along = self.region, self.count == self.shape[0]
        if isinstance(region, FlatRange):
            return region
        if isinstance(region, Rectangle):  # of (shape[0], all else)
            width = math.prod(self.shape[1:])
            if (region.col, region.col_end) == (0, width) or not region.numel:
                return FlatRange(region.row * width, region.row_end * width, columns)
            if is_along and len(self.shape) > 2:
                cut = Rectangle(region.col // columns, region.col_end // columns, 0, columns)
                exact = region.col % columns == region.col_end % columns == 0
                return _Same(region.row, region.row_end, cut) if exact else None
            whole = (region.row, region.row_end) == (0, self.shape[0])
            return _Same(0, self.count, Rectangle(0, rows, region.col, region.col_end)) if whole else None
        if not region.numel:
            return FlatRange(0, 0, columns)
        if not is_along or self.shape[3:] != region.size[3:]:
            return None
        (first, row, col, *_), (count, height, width, *_) = region.offset, region.size
        inner = math.prod(self.shape[3:])
        return _Same(first, first + count, Rectangle(row, row + height, col * inner, (col + width) * inner))

    @property
    def cuts(self) -> list[int]:
        """Between which matrices what this rank holds of them changes."""
        held, size = self._held, self._size
        assert held is not None
        if isinstance(held, _Same):
            return [held.first, held.last]
        if not held.numel or not size:
            return []
        return [held.start // size, -(-held.start // size), held.stop // size, -(-held.stop // size)]

    def statistic_shape(self, kind: StatisticKind) -> tuple[int, ...]:
        """Shape of numbers that are kept of the matrices: those of one matrix, one after the other."""
        one = self.matrix.statistic_shape(kind)
        if self.count == 1:
            return one
        has_blocks = len(self.matrix.blocks) > 1
        return (self.count * one[0], *one[1:]) if has_blocks else (self.count, *one)

    def spread_state(self, numbers: Tensor, kind: StatisticKind, shape: torch.Size) -> Tensor:
        """Numbers of `statistic_shape`, laid out like the local shard of that shape."""
        spread = torch.zeros(shape, dtype=numbers.dtype, device=numbers.device)
        for part in self._own_parts():
            local = part.local(spread)
            of_part = part.layout.by_block(part.numbers(numbers, kind), kind)
            local.copy_(part.layout.spread(of_part, local.shape[1:]).expand(local.shape))
        return spread

    def collect_state(self, local: Tensor, kind: StatisticKind) -> Tensor:
        """The inverse of `spread_state`: zeros where this shard has no element."""
        numbers = torch.zeros(self.statistic_shape(kind), dtype=local.dtype, device=local.device)
        for part in self._own_parts():
            of_part = part.numbers(numbers, kind)
            of_part.copy_(part.layout.collect(part.local(local), kind).view(of_part.shape))
        return numbers

    def _own_parts(self) -> list[BatchPart]:
        """The matrices of which this rank holds something, by what it holds."""
        cuts = sorted({0, self.count, *self.cuts})
        parts = [self.part(*bounds) for bounds in itertools.pairwise(cuts)]
        return [part for part in parts if part.layout.region.numel]

    def part(self, first: int, last: int) -> BatchPart:
        """Some consecutive matrices, of which every rank holds the same part."""
        held, size = self._held, self._size
        region: Rectangle | FlatRange
        if isinstance(held, _Same):
            region = held.region if held.first <= first and last <= held.last else _NOTHING
        else:
            assert held is not None
            start, stop = max(held.start, first * size) - first * size, min(held.stop, last * size) - first * size
            rows, columns = self.matrix.stored
            if start >= stop:
                region = _NOTHING
            elif (start, stop) == (0, (last - first) * size):
                region = Rectangle(0, rows, 0, columns)
            else:
                assert last - first == 1
                region = FlatRange(start, stop, columns)
        one = self.matrix
        return BatchPart(self, first, last, Layout(one.shape, region, one.transposed, one.blocks))


@dataclass(frozen=True)
class BatchPart:
    """Consecutive matrices of a batched parameter.

    Args:
        of: All of them.
        first: The first one.
        last: The one after the last.
        layout: Of each: of one shape and region.
    """

    of: BatchLayout
    first: int
    last: int
    layout: Layout

    @property
    def count(self) -> int:
        """How many they are."""
        return self.last - self.first

    def local(self, tensor: Tensor) -> Tensor:
        """Their shards in the parameter, its gradient or a state like it: a view (count, ...) of contiguous tensors."""
        shard, held, region = local_tensor(tensor).view(-1), self.of._held, self.layout.region
        if not region.numel:
            return shard[:0].view(self.count, 0)
        if isinstance(held, _Same):
            height, width = region.row_end - region.row, region.col_end - region.col
            return shard.view(-1, height, width)[self.first - held.first : self.last - held.first]
        assert held is not None
        begin = max(self.first * self.of._size - held.start, 0)
        run = shard[begin : begin + self.count * region.numel]
        return run.view(self.count, *((region.numel,) if isinstance(region, FlatRange) else self.of.matrix.stored))

    def numbers(self, state: Tensor, kind: StatisticKind) -> Tensor:
        """Their numbers among those of all, a view (count, ...)."""
        one = self.layout.statistic_shape(kind)
        return state.view(self.of.count, *one)[self.first : self.last]


def layout_of(
    shape: tuple[int, ...],
    region: ShardRegion | Box,
    *,
    batched: Batched,
    transposed: bool,
    blocks: int | Sequence[int],
    name: str,
) -> Layout | BatchLayout:
    """The layout of a parameter, from its group's keys.

    Raises:
        ValueError: If blocks or batch do not fit, or a part is no rectangle of the matrix.
    """
    if batched:
        return BatchLayout.of(shape, region, batched=batched, transposed=transposed, blocks=blocks, name=name)
    if isinstance(region, Box):
        raise ValueError(
            f"Expected {name} {shape} to be replicated or sharded over dimension 0 or 1, but this rank holds {region} "
            "of it. Shard it over dimension 0 or 1, or route it to AdamW (adamw=...)."
        )
    return Layout.of(shape, region, transposed=transposed, blocks=blocks, name=name)


def divide(layouts: Sequence[BatchLayout]) -> list[tuple[int, int]]:
    """Cut a batch so that each rank has one region of each part's matrices, and every rank may own some.

    Args:
        layouts: Of the same parameter on each rank.

    Returns:
        First and last of each part, the same on all ranks.
    """
    count, ranks = layouts[0].count, len(layouts)
    cuts = sorted({0, count, *(cut for layout in layouts for cut in layout.cuts)})
    parts = []
    for first, last in itertools.pairwise(cuts):
        whole = sum(layout.part(first, last).layout.region.numel == layout._size > 0 for layout in layouts)
        pieces = 1 if whole == 1 else min(ranks, last - first)
        bounds = [first + (last - first) * k // pieces for k in range(pieces + 1)]
        parts += list(itertools.pairwise(bounds))
    return parts
