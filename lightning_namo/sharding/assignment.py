"""Which rank owns which matrix, and what is sent to it and returned: pure data, computed alike on all ranks."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_namo.sharding.agreement import check_agreement, check_cover
from lightning_namo.sharding.layout import ShardRegion

_STAYING = 4 / 3  # of an even share of the work: up to there a rank works on what it holds, so that nothing is sent
_OVERLAPPING = 3  # buckets from which on communication overlaps with work


@dataclass(frozen=True)
class Matrix:
    """A stored matrix as every rank must know it: the same on all ranks but for the region.

    Args:
        name: For messages.
        shape: Rows and columns.
        dtype: In which it is communicated.
        cost: Of the work on it, in any unit (FLOPs).
        region: The part that this rank holds.
        kind: Matrices of one kind may be stacked and worked on together.
        count: How many such matrices it stands for, which are laid out alike and stored one after the other.
        stays: Whether the only rank that holds all of it is to own it, so that nothing is sent.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    cost: int
    region: ShardRegion
    kind: Hashable = ()
    count: int = 1
    stays: bool = False


@dataclass(frozen=True)
class Assignment:
    """Who owns, who sends and who receives what. Pure data, equal on all ranks.

    Args:
        owners: Rank that works on each matrix.
        regions: For each rank, the region that it holds of each matrix.
        senders: For each matrix, the rank that sends each of its distinct regions to the owner.
        buckets: Matrices that are communicated together, in order.
    """

    owners: tuple[int, ...]
    regions: tuple[tuple[ShardRegion, ...], ...]
    senders: tuple[dict[ShardRegion, int], ...]
    buckets: tuple[tuple[int, ...], ...]

    def holders(self, index: int) -> list[int]:
        """Ranks that hold a part of a matrix."""
        return [rank for rank, regions in enumerate(self.regions) if regions[index].numel]


def assign_owners(costs: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Owner rank of each matrix, so that the busiest rank has as little to do as whole matrices allow.

    Longest first to the least loaded rank; then MULTIFIT (Coffman, Garey and Johnson 1978): bisect the load for the
    smallest into which the matrices fit, first-fit decreasing, to within a part in a thousand. The busiest of 48 ranks
    then has 5% less to do for Llama 7B. Last, swap matrices of the busiest rank for cheaper ones of others while that
    helps.

    Args:
        costs: Cost of each matrix.
        world_size: Number of ranks; may exceed the number of matrices.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    best = _longest_first(costs, order, world_size)
    low, high = max(sum(costs) / world_size, max(costs, default=0)), _busiest(costs, best)
    while high - low > low / 1000:
        owners = _first_fit(costs, order, world_size, (low + high) / 2)
        if owners is None:
            low = (low + high) / 2
        else:
            best, high = owners, _busiest(costs, owners)
    _swap(costs, best, world_size)
    return tuple(best)


def _longest_first(costs: Sequence[int], order: Sequence[int], world_size: int) -> list[int]:
    owners, loads = [0] * len(costs), [(0, rank) for rank in range(world_size)]
    for index in order:
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


def _first_fit(costs: Sequence[int], order: Sequence[int], world_size: int, capacity: float) -> list[int] | None:
    owners, loads = [0] * len(costs), [0] * world_size
    rank, cost = 0, None
    for index in order:
        if costs[index] != cost:  # a rank that was too full for the last matrix is too full for one of the same cost
            rank, cost = 0, costs[index]
        while rank < world_size and loads[rank] + cost > capacity:
            rank += 1
        if rank == world_size:
            return None
        owners[index] = rank
        loads[rank] += cost
    return owners


def _swap(costs: Sequence[int], owners: list[int], world_size: int) -> None:
    """Change the owners of one matrix, or two, as long as that lowers the load of the busiest rank or of its equals."""
    owned: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(world_size)]  # matrices of a rank by cost
    loads = [0] * world_size
    for index, owner in enumerate(owners):
        owned[owner][costs[index]].append(index)
        loads[owner] += costs[index]
    while True:
        busiest = max(range(world_size), key=lambda rank: loads[rank])
        changes = (
            (max(loads[busiest] - given + taken, loads[rank] + given - taken), rank, given, taken)
            for rank in range(world_size)
            if rank != busiest
            for given in owned[busiest]
            for taken in (0, *owned[rank])
        )
        after, rank, given, taken = min(changes, default=(loads[busiest], 0, 0, 0))
        if after >= loads[busiest]:
            return
        for cost, source, target in ((given, busiest, rank), (taken, rank, busiest)):
            if cost:
                index = owned[source][cost].pop()
                if not owned[source][cost]:
                    del owned[source][cost]
                owned[target][cost].append(index)
                owners[index] = target
                loads[source], loads[target] = loads[source] - cost, loads[target] + cost


def _busiest(costs: Sequence[int], owners: Sequence[int]) -> int:
    loads: dict[int, int] = defaultdict(int)
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return max(loads.values(), default=0)


def assign(published: Sequence[Sequence[Matrix]], bucket_bytes: int) -> Assignment:
    """Assign matrices to owners, senders and buckets, from what every rank published.

    Args:
        published: For each rank, its matrices, in the same order.
        bucket_bytes: Bound on the bytes of the matrices that one rank assembles at a time; a larger matrix is in
            a bucket of its own.

    Raises:
        ValueError: If the ranks disagree on the matrices, or their regions do not make up a matrix.
    """
    check_agreement([[(m.name, m.shape, m.dtype) for m in matrices] for matrices in published])
    matrices = published[0]
    regions = tuple(tuple(m.region for m in rank) for rank in published)
    owners = _owners(matrices, regions)
    senders = _senders(matrices, owners, regions)
    return Assignment(owners, regions, senders, _buckets(matrices, owners, bucket_bytes))


def _owners(matrices: Sequence[Matrix], regions: tuple[tuple[ShardRegion, ...], ...]) -> tuple[int, ...]:
    """Owners of all matrices.

    Those that stay are owned by the only rank that holds them, up to `_STAYING` times an even share of the work; the
    others by load, and by what ranks hold.
    """
    costs, ranks = [m.cost for m in matrices], range(len(regions))
    share = max(sum(costs) / len(ranks), max(costs, default=0))
    loads, homes = [0] * len(ranks), dict[int, int]()
    order = sorted(range(len(matrices)), key=lambda i: (-costs[i], i))
    for index in order:
        holders = [rank for rank in ranks if matrices[index].stays and regions[rank][index].numel]
        if len(holders) == 1 and loads[holders[0]] + costs[index] <= _STAYING * share:
            homes[index] = holders[0]
            loads[holders[0]] += costs[index]
    if not homes:
        return _keep_local(assign_owners(costs, len(ranks)), regions)
    for index in order:
        if index not in homes:
            homes[index] = min(ranks, key=lambda rank: (loads[rank], -regions[rank][index].numel, rank))
            loads[homes[index]] += costs[index]
    return tuple(homes[i] for i in range(len(matrices)))


def _keep_local(owners: tuple[int, ...], regions: tuple[tuple[ShardRegion, ...], ...]) -> tuple[int, ...]:
    """Rename the owners, greedily, so that ranks own what they hold: same loads, fewer bytes to send."""
    numels_of: dict[int, list[int]] = {}  # by owner: elements on each rank
    for index, owner in enumerate(owners):
        numels = [of_rank[index].numel for of_rank in regions]
        numels_of[owner] = (
            [a + b for a, b in zip(numels_of[owner], numels, strict=True)] if owner in numels_of else numels
        )
    renamed: dict[int, int] = {}
    taken: set[int] = set()
    pairs = ((-numel, owner, rank) for owner, numels in numels_of.items() for rank, numel in enumerate(numels) if numel)
    for _, owner, rank in sorted(pairs):
        if owner not in renamed and rank not in taken:
            renamed[owner] = rank
            taken.add(rank)
    free = (rank for rank in range(len(regions)) if rank not in taken)
    for owner in owners:
        if owner not in renamed:
            renamed[owner] = next(free)
    return tuple(renamed[owner] for owner in owners)


def _senders(
    matrices: Sequence[Matrix], owners: tuple[int, ...], regions: tuple[tuple[ShardRegion, ...], ...]
) -> tuple[dict[ShardRegion, int], ...]:
    """One sender for each distinct region: the owner itself if it holds it, else the holders take turns."""
    senders = []
    known: dict[
        tuple[int, int], tuple[list[ShardRegion], dict[ShardRegion, list[int]]]
    ] = {}  # most shapes are cut in one way
    for index, (matrix, owner) in enumerate(zip(matrices, owners, strict=True)):
        by_rank = [of_rank[index] for of_rank in regions]
        if matrix.shape not in known or known[matrix.shape][0] != by_rank:
            known[matrix.shape] = by_rank, _holders(matrix, by_rank)
        _, holders = known[matrix.shape]
        senders.append({r: owner if owner in ranks else ranks[index % len(ranks)] for r, ranks in holders.items()})
    return tuple(senders)


def _holders(matrix: Matrix, by_rank: Sequence[ShardRegion]) -> dict[ShardRegion, list[int]]:
    """The ranks that hold each distinct region of a matrix."""
    holders: dict[ShardRegion, list[int]] = defaultdict(list)
    for rank, region in enumerate(by_rank):
        if region.numel:
            holders[region].append(rank)
    check_cover(matrix.name, matrix.shape, list(holders))
    return holders


def _buckets(matrices: Sequence[Matrix], owners: tuple[int, ...], bucket_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Cut each owner's matrices, ordered by type, cost and shape, into portions; the k-th portions make bucket k.

    Ranks wait for each other at every bucket, so that the k-th portions should take all owners equally long: they are
    about as many as the bound asks for, and three for overlap where every owner has as many matrices, of about equal
    cost.
    """
    buckets: list[tuple[int, ...]] = []
    for dtype in sorted({m.dtype for m in matrices}, key=str):
        sizes = {i: m.count * math.prod(m.shape) * dtype.itemsize for i, m in enumerate(matrices) if m.dtype == dtype}
        of_owner: dict[int, list[int]] = defaultdict(list)
        for index in sorted(sizes, key=lambda i: (-matrices[i].cost, matrices[i].shape, i)):
            of_owner[owners[index]].append(index)
        costs = {i: matrices[i].cost for i in sizes}
        count = max(len(_portions(indices, sizes, costs, bucket_bytes, 1)) for indices in of_owner.values())
        if len(of_owner) > 1:
            count = max(count, min(_OVERLAPPING, *map(len, of_owner.values())))
        cuts = min(
            ([_portions(ix, sizes, costs, bucket_bytes, n) for ix in of_owner.values()] for n in (count, count + 1)),
            key=lambda cuts: _waiting(cuts, costs),
        )
        for portions in itertools.zip_longest(*cuts, fillvalue=[]):
            buckets.append(tuple(index for portion in portions for index in portion))
    return tuple(buckets)


def _waiting(cuts: Sequence[Sequence[Sequence[int]]], costs: Mapping[int, int]) -> int:
    """Cost of all buckets if each takes as long as its busiest owner."""
    buckets = itertools.zip_longest(*cuts, fillvalue=())
    return sum(max(sum(costs[i] for i in portion) for portion in portions) for portions in buckets)


def _portions(
    indices: Sequence[int], sizes: Mapping[int, int], costs: Mapping[int, int], bound: int, count: int
) -> list[list[int]]:
    """Cut matrices, in order, into ``count`` portions of about equal cost; into more where a size would pass the bound.

    A portion ends where one more matrix would take it further from an equal share of what is left than it is.
    """
    portions: list[list[int]] = [[]]
    size = cost = 0
    left = sum(costs[index] for index in indices)
    for index in indices:
        share = left / max(1, count - len(portions) + 1)
        full = size + sizes[index] > bound
        enough = len(portions) < count and 2 * cost + costs[index] > 2 * share
        if portions[-1] and (full or enough):
            left -= cost
            portions.append([])
            size = cost = 0
        portions[-1].append(index)
        size, cost = size + sizes[index], cost + costs[index]
    return portions
