"""Sharing out whole-matrix work over the ranks: shards go to one owner per matrix, results come back as shards.

Knows no optimizer and no parallel strategy: a layout is a `Region` per rank and matrix, the work is a function. With
one process everything is local and the same calls communicate nothing.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.regions import Region, Span

DEFAULT_BUCKET_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Matrix:
    """What every rank must know of a stored matrix: the same on all ranks, but for the region.

    Args:
        name: For messages.
        shape: Rows and columns.
        dtype: In which it travels, as a string ("torch.bfloat16").
        cost: Of the work on it, in any unit (FLOPs).
        region: The part that this rank holds.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    cost: int
    region: Region


@dataclass(frozen=True)
class Plan:
    """Who owns, who sends and who receives what. Pure data, equal on all ranks.

    Args:
        owners: Rank that works on each matrix.
        regions: For each rank, the region that it holds of each matrix.
        senders: For each matrix, the rank that sends each of its distinct regions to the owner.
        buckets: Matrices that travel together, in order.
    """

    owners: tuple[int, ...]
    regions: tuple[tuple[Region, ...], ...]
    senders: tuple[dict[Region, int], ...]
    buckets: tuple[tuple[int, ...], ...]

    def holders(self, index: int) -> list[int]:
        """Ranks that hold a part of a matrix."""
        return [rank for rank, regions in enumerate(self.regions) if regions[index].numel]


def assign_owners(costs: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Owner rank of each matrix: longest first to the least loaded rank, so the busiest is close to the bound.

    Args:
        costs: Cost of each matrix.
        world_size: Number of ranks; may exceed the number of matrices.
    """
    owners = [0] * len(costs)
    loads = [(0, rank) for rank in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        owners[index] = rank
        heapq.heapreplace(loads, (load + costs[index], rank))
    return tuple(owners)


def make_plan(published: Sequence[Sequence[Matrix]], bucket_bytes: int) -> Plan:
    """Plan the exchange from what every rank published.

    Args:
        published: For each rank, its matrices, in the same order.
        bucket_bytes: Bound on the bytes of the matrices that one rank assembles at a time; a larger matrix travels
            alone.

    Raises:
        ValueError: If the ranks disagree on the matrices, or their regions do not make up a matrix.
    """
    _check_agreement(published)
    matrices = published[0]
    owners = assign_owners([m.cost for m in matrices], len(published))
    regions = tuple(tuple(m.region for m in rank) for rank in published)
    senders = tuple(_senders(matrix, index, owners[index], regions) for index, matrix in enumerate(matrices))
    return Plan(owners, regions, senders, _buckets(matrices, owners, bucket_bytes))


def _check_agreement(published: Sequence[Sequence[Matrix]]) -> None:
    expected = [(m.name, m.shape, m.dtype) for m in published[0]]
    for rank, matrices in enumerate(published):
        found = [(m.name, m.shape, m.dtype) for m in matrices]
        for theirs, ours in zip(expected, found, strict=False):
            if theirs != ours:
                raise ValueError(
                    f"Expected the same matrices on all ranks, but rank 0 has {_describe(theirs)} where rank {rank} "
                    f"has {_describe(ours)}. Build the same model and the same parameter groups on every rank."
                )
        if len(found) != len(expected):
            longer, more = (0, expected) if len(expected) > len(found) else (rank, found)
            raise ValueError(
                f"Expected the same matrices on all ranks, but rank 0 has {len(expected)} and rank {rank} has "
                f"{len(found)}: only rank {longer} has {_describe(more[min(len(found), len(expected))])}. Build the "
                "same model and the same parameter groups on every rank."
            )


def _describe(key: tuple[str, tuple[int, int], str]) -> str:
    return f"{key[0]} {key[1]} {key[2]}"


def _senders(matrix: Matrix, index: int, owner: int, regions: tuple[tuple[Region, ...], ...]) -> dict[Region, int]:
    """One sender for each distinct region: the owner itself if it holds it, else the holders take turns."""
    holders: dict[Region, list[int]] = defaultdict(list)
    for rank, of_rank in enumerate(regions):
        if of_rank[index].numel:
            holders[of_rank[index]].append(rank)
    _check_cover(matrix, list(holders))
    return {region: owner if owner in ranks else ranks[index % len(ranks)] for region, ranks in holders.items()}


def _check_cover(matrix: Matrix, regions: list[Region]) -> None:
    """Raise unless the distinct regions tile the matrix: runs end to end, or bands of rows cut into columns."""
    rows, cols = matrix.shape
    intervals: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for region in regions:
        if isinstance(region, Span):
            intervals[0, rows].append((region.start, region.stop))
        else:
            intervals[region.row, region.row_end].append((region.col, region.col_end))
    width = rows * cols if any(isinstance(region, Span) for region in regions) else cols
    tiled = _tiles(list(intervals), rows) and all(_tiles(columns, width) for columns in intervals.values())
    if not tiled and rows * cols:
        raise ValueError(
            f"Expected the shards of {matrix.name} {matrix.shape} to make up the whole matrix, but the ranks hold "
            f"{regions}. This placement cannot be served; route the parameter to AdamW (adamw=...) or shard it "
            "over dimension 0 or 1."
        )


def _tiles(intervals: list[tuple[int, int]], length: int) -> bool:
    position = 0
    for begin, end in sorted(intervals):
        if begin != position:
            return False
        position = end
    return position == length


def _buckets(matrices: Sequence[Matrix], owners: tuple[int, ...], bucket_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Cut each owner's matrices, ordered by type and shape, into portions; the k-th portions make bucket k."""
    buckets: list[tuple[int, ...]] = []
    for dtype in sorted({m.dtype for m in matrices}):
        portions: dict[int, list[int]] = defaultdict(list)
        filled: dict[int, tuple[int, int]] = {}  # owner -> (portion number, bytes in it)
        itemsize = getattr(torch, dtype.removeprefix("torch.")).itemsize
        for index in sorted(range(len(matrices)), key=lambda i: (matrices[i].shape, i)):
            if matrices[index].dtype != dtype:
                continue
            size = matrices[index].shape[0] * matrices[index].shape[1] * itemsize
            portion, used = filled.get(owners[index], (0, 0))
            if used and used + size > bucket_bytes:
                portion, used = portion + 1, 0
            portions[portion].append(index)
            filled[owners[index]] = (portion, used + size)
        buckets += [tuple(portions[k]) for k in sorted(portions)]
    return tuple(buckets)


@dataclass
class _Leg:
    """One all-to-all: what this rank sends and receives, each as (peer, matrix index, region), in order of peers."""

    sends: list[tuple[int, int, Region]]
    receives: list[tuple[int, int, Region]]
    needed: bool  # by any rank: all take part or none


@dataclass
class _InFlight:
    leg: _Leg
    work: dist.Work | None
    received: Tensor
    sent: Tensor  # kept alive until the communication is over

    def pieces(self) -> Iterator[tuple[int, Region, Tensor]]:
        """Wait, then give (matrix index, region, flat tensor) of everything that arrived."""
        if self.work is not None:
            self.work.wait()
        sizes = [region.numel for _, _, region in self.leg.receives]
        for (_, index, region), piece in zip(self.leg.receives, torch.split(self.received, sizes), strict=True):
            yield index, region, piece


class Exchange:
    """Runs work on whole matrices that lie in shards over the ranks of the default process group.

    Building one is collective: all ranks must do it at the same point.

    Args:
        matrices: This rank's view of every matrix.
        device: Where tensors live.
        bucket_bytes: See `make_plan`; a rank holds at most about three buckets at a time.

    Raises:
        ValueError: On all ranks, if they disagree or the shards do not make up a matrix.
    """

    def __init__(
        self, matrices: Sequence[Matrix], device: torch.device, bucket_bytes: int = DEFAULT_BUCKET_BYTES
    ) -> None:
        self.matrices = list(matrices)
        self.device = device
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        published = [self.matrices]
        if self.world_size > 1:
            published = [[] for _ in range(self.world_size)]
            dist.all_gather_object(published, self.matrices)
        self.plan = make_plan(published, bucket_bytes)
        self.holder_counts = [len(self.plan.holders(i)) for i in range(len(matrices))]
        self._ways_in = [self._way_in(bucket) for bucket in self.plan.buckets]
        self._ways_back = [self._way_back(bucket) for bucket in self.plan.buckets]

    @property
    def shared(self) -> bool:
        """Whether other ranks take part, so that all must take part in the same matrices."""
        return self.world_size > 1

    def contributes(self, index: int) -> bool:
        """Whether this rank's shard of a matrix counts in sums: replicas count once."""
        return self.plan.senders[index].get(self.matrices[index].region) == self.rank

    def sum(self, partials: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; the same bits on all of them."""
        if self.shared:
            dist.all_reduce(partials)
        return partials

    def map(
        self,
        indices: Sequence[int],
        shard: Callable[[int], Tensor],
        work: Callable[[list[int], list[Tensor]], list[Tensor]],
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """Apply work to whole matrices and give back this rank's shards of the results, bucket by bucket.

        The next bucket's communication runs while the caller and ``work`` compute on this one.

        Args:
            indices: Matrices that take part: the same on all ranks.
            shard: Gives this rank's shard of a matrix, in the matrix's dtype; called once for each, when it leaves.
            work: From matrix indices and stored matrices (rows, columns) to results of the same shapes and dtypes.
                Its inputs may be the shards themselves: it must not modify them.

        Yields:
            For each bucket the pairs of matrix index and flat local result, empty for an empty shard.
        """
        chosen = set(indices)
        buckets = [[i for i in bucket if i in chosen] for bucket in self.plan.buckets]
        arriving = self._depart(0, buckets[0], shard) if buckets else None
        returning: tuple[list[int], dict[int, Tensor], _InFlight] | None = None
        for number, bucket in enumerate(buckets):
            assert arriving is not None
            here = arriving
            if number + 1 < len(buckets):
                arriving = self._depart(number + 1, buckets[number + 1], shard)
            whole = self._assemble(bucket, *here)
            owned = list(whole)
            results = dict(zip(owned, work(owned, [whole[i] for i in owned]), strict=True))
            del whole, here
            back = self._send_back(number, bucket, results)
            if returning is not None:
                yield self._deliver(*returning)
            returning = back
        if returning is not None:
            yield self._deliver(*returning)

    def _way_in(self, bucket: Sequence[int]) -> _Leg:
        plan, sends, receives, needed = self.plan, [], [], False
        for index in bucket:
            for region, sender in plan.senders[index].items():
                owner = plan.owners[index]
                if sender == owner:
                    continue
                needed = True
                if sender == self.rank:
                    sends.append((owner, index, region))
                if owner == self.rank:
                    receives.append((sender, index, region))
        return _Leg(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _way_back(self, bucket: Sequence[int]) -> _Leg:
        plan, sends, receives, needed = self.plan, [], [], False
        for index in bucket:
            owner = plan.owners[index]
            for rank in plan.holders(index):
                if rank == owner:
                    continue
                needed = True
                if owner == self.rank:
                    sends.append((rank, index, plan.regions[rank][index]))
                if rank == self.rank:
                    receives.append((owner, index, plan.regions[rank][index]))
        return _Leg(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _depart(
        self, number: int, bucket: list[int], shard: Callable[[int], Tensor]
    ) -> tuple[dict[int, Tensor], _InFlight]:
        shards = {index: shard(index).reshape(-1) for index in bucket}
        leg = self._ways_in[number]
        in_flight = self._start(leg, [shards[index] for _, index, _ in leg.sends if index in shards], bucket)
        own = {index: shards[index] for index in bucket if self.plan.owners[index] == self.rank}
        return own, in_flight

    def _start(self, leg: _Leg, pieces: list[Tensor], bucket: list[int]) -> _InFlight:
        dtype = getattr(torch, self.matrices[bucket[0]].dtype.removeprefix("torch.")) if bucket else torch.float32
        if not leg.needed:
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            return _InFlight(leg, None, nothing, nothing)
        sent = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=self.device)
        in_sizes, out_sizes = [0] * self.world_size, [0] * self.world_size
        for peer, _, region in leg.sends:
            in_sizes[peer] += region.numel
        for peer, _, region in leg.receives:
            out_sizes[peer] += region.numel
        received = torch.empty(sum(out_sizes), dtype=dtype, device=self.device)
        work = dist.all_to_all_single(received, sent, out_sizes, in_sizes, async_op=True)
        return _InFlight(leg, work, received, sent)

    def _assemble(self, bucket: list[int], own: dict[int, Tensor], arriving: _InFlight) -> dict[int, Tensor]:
        """The owned matrices of a bucket, each (rows, columns); a whole own shard is used as it lies."""
        whole: dict[int, Tensor] = {}
        for index in bucket:
            if self.plan.owners[index] != self.rank:
                continue
            (rows, cols), region = self.matrices[index].shape, self.matrices[index].region
            if region.numel == rows * cols:
                whole[index] = own[index].view(rows, cols)
            else:
                whole[index] = own[index].new_empty(rows, cols)
                _write(whole[index], region, own[index])
        for index, region, piece in arriving.pieces():
            _write(whole[index], region, piece)
        return whole

    def _send_back(
        self, number: int, bucket: list[int], results: dict[int, Tensor]
    ) -> tuple[list[int], dict[int, Tensor], _InFlight]:
        leg = self._ways_back[number]
        in_flight = self._start(leg, [region.of(results[i]).reshape(-1) for _, i, region in leg.sends], bucket)
        own = {index: self.matrices[index].region.of(result).reshape(-1) for index, result in results.items()}
        return bucket, own, in_flight

    def _deliver(self, bucket: list[int], own: dict[int, Tensor], arriving: _InFlight) -> list[tuple[int, Tensor]]:
        local = dict(own)
        for index, _, piece in arriving.pieces():
            local[index] = piece
        empty = torch.empty(0, device=self.device)
        return [(index, local.get(index, empty)) for index in bucket]


def _peer(item: tuple[int, int, Region]) -> int:
    return item[0]


def _write(full: Tensor, region: Region, flat: Tensor) -> None:
    target = region.of(full)
    target.copy_(flat.view(target.shape))
