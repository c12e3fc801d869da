"""Ranks as a mesh, and what each holds of a parameter under a parallel strategy: arithmetic, without processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.layout import Rectangle, stored_shape

LAYOUTS = ("ddp", "fsdp2", "hsdp", "fsdp2_tp")


@dataclass(frozen=True)
class SimulatedMesh:
    """Ranks as replicas x shards x tensor-parallel ranks, the last ones neighbours: DDP has replicas only.

    Args:
        replicas: Copies of the sharded model.
        shards: Ranks over which FSDP2 divides a copy.
        tensor: Ranks that share each block.
    """

    replicas: int
    shards: int
    tensor: int

    @classmethod
    def of(cls, layout: str, ranks: int, replicas: int | None = None, tensor: int | None = None) -> SimulatedMesh:
        """The mesh of a layout.

        Args:
            layout: "ddp", "fsdp2", "hsdp" or "fsdp2_tp".
            ranks: Number of ranks.
            replicas: Of hsdp, and of fsdp2_tp if it has any; of hsdp ranks / 8 (nodes of eight) unless given.
            tensor: Tensor-parallel ranks of fsdp2_tp; 2 unless given.

        Raises:
            ValueError: An unknown layout, a size that it has not, sizes that do not divide the ranks.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"Expected layout to be one of {', '.join(LAYOUTS)}. Got {layout!r}.")
        if replicas not in (None, 1) and layout in ("ddp", "fsdp2"):
            raise ValueError(f"Expected replicas with hsdp or fsdp2_tp only. Got {replicas} with {layout}.")
        if tensor not in (None, 1) and layout != "fsdp2_tp":
            raise ValueError(f"Expected tensor with fsdp2_tp only. Got {tensor} with {layout}.")
        if layout == "ddp":
            return cls(ranks, 1, 1)
        copies = replicas or (max(ranks // 8, 1) if layout == "hsdp" else 1)
        parts = tensor or (2 if layout == "fsdp2_tp" else 1)
        if ranks % (copies * parts):
            raise ValueError(
                f"Expected replicas * tensor to divide the {ranks} ranks. Got {copies} * {parts} = {copies * parts}."
            )
        return cls(copies, ranks // (copies * parts), parts)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.replicas * self.shards * self.tensor

    def region(self, shape: Sequence[int], shard: int, part: int, divided: int | None = None) -> Rectangle | Box:
        """The region of a parameter that a rank holds.

        Args:
            shape: The parameter's.
            shard: Place of the rank among those of its copy that FSDP2 shards over.
            part: Place among the tensor-parallel ranks.
            divided: Dimension that tensor parallelism divides; None: it leaves the parameter whole.
        """
        rows, cols = stored_shape(shape)
        begin, end, col, col_end = 0, rows, 0, cols
        if divided == 0:
            begin, end = chunk(rows, self.tensor, part)
        elif divided == 1:
            inner = cols // shape[1]
            col, col_end = (bound * inner for bound in chunk(shape[1], self.tensor, part))
        first, last = chunk(end - begin, self.shards, shard)
        if divided is not None and divided > 1:
            offset, size = [first, *(0 for _ in shape[1:])], [last - first, *shape[1:]]
            begin, end = chunk(shape[divided], self.tensor, part)
            offset[divided], size[divided] = begin, end - begin
            return Box(tuple(shape), tuple(offset), tuple(size))
        region = Rectangle(begin + first, begin + last, col, col_end)
        return region if region.numel else Rectangle(0, 0, 0, 0)

    def each(self, of: Callable[[int, int], Any]) -> list[Any]:
        """What a function of (shard, part) gives for each rank; called once for all replicas."""
        return [of(*place) for place in itertools.product(range(self.shards), range(self.tensor))] * self.replicas


def chunk(length: int, parts: int, place: int) -> tuple[int, int]:
    """Bounds of one chunk as torch.chunk cuts: all of ceil(length / parts), the last ones smaller or empty."""
    size = -(-length // parts)
    return min(place * size, length), min((place + 1) * size, length)
