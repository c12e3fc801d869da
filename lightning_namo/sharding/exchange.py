"""Sharing out whole-matrix work over the ranks: shards go to one owner per matrix, results come back as shards.

Knows no optimizer and no parallel strategy: a layout is a `Region` per rank and matrix, the work is a function. With
one process everything is local and the same calls communicate nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.sharding.agreement import (
    Holding,
    Hyper,
    check_agreement,
    check_hyper,
    check_order,
    check_replicas,
    tolerance,
)
from lightning_namo.sharding.assignment import Matrix, make_plan
from lightning_namo.sharding.layout import Region
from lightning_namo.sharding.process_group import current_group, initialized, meeting
from lightning_namo.workspace import Workspace

BUCKET_BYTES = 32 * 2**20  # by default; small matrices fill an accelerator in stacks only
CPU_BUCKET_BYTES = 8 * 2**20  # on CPUs, which one matrix keeps busy: less memory, and more of the way overlaps
CACHED_ELEMENTS = 2**20  # bound on a stack on CPUs, where larger ones leave the cache between operations
_HISTORY: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
"""Of each process group how many exchanges were planned in it, and the number of the last one's optimizer."""


@dataclass(frozen=True)
class Parcel:
    """Matrices that lie alike on every rank and have one owner: they travel and are worked on as one tensor."""

    indices: tuple[int, ...]
    owner: int
    senders: dict[Region, int]


@dataclass(frozen=True)
class Published:
    """What a rank tells the others before the first step, beside its matrices' regions.

    Args:
        matrices: The parameters in the order of the matrices.
        adamw: The parameters that are not matrices.
        hyper: Of each group its name and plain hyper-parameters.
        number: Of the optimizer, in the order in which this process built them.
        compare: Whether replicas' weights are to be compared.
    """

    matrices: Sequence[Holding] = ()
    adamw: Sequence[Holding] = ()
    hyper: Hyper = field(default_factory=list)
    number: int = 0
    compare: bool = True


@dataclass(frozen=True)
class Replicas:
    """Of one parameter.

    Args:
        count: How many ranks, at most, hold the same part of it; the same on all ranks.
        weight: 1 where this rank repeats what an earlier one holds; there minus how many repeat it; 0 if none does.
            With these weights a number that all replicas have alike adds up to zero.
    """

    count: int
    weight: int

    @classmethod
    def of(cls, rank: int, parts: Sequence[Holding]) -> Replicas:
        """From every rank's part of a parameter."""
        holders: dict[Any, list[int]] = defaultdict(list)
        for other, part in enumerate(parts):
            if part.region is not None:
                holders[part.region].append(other)
        same = holders.get(parts[rank].region, [rank])
        return cls(max(map(len, holders.values()), default=1), 1 - len(same) if same[0] == rank else 1)


@dataclass
class _Leg:
    """One all-to-all: what this rank sends and receives, each as (peer, parcel's place, region), in order of peers."""

    sends: list[tuple[int, int, Region]]
    receives: list[tuple[int, int, Region]]
    needed: bool  # by any rank: all take part or none


@dataclass
class _InFlight:
    work: dist.Work | None
    received: Tensor
    sent: Tensor  # kept alive until the communication is over


Stacks: TypeAlias = list[tuple[tuple[int, ...], Tensor]]  # indices of K matrices, and one tensor (K, ...) of them


class Exchange:
    """Runs work on whole matrices that lie in shards over the ranks of the default process group.

    Building one is collective: all ranks must do it at the same point.

    Args:
        matrices: This rank's view of every matrix.
        device: Where tensors live.
        bucket_bytes: See `make_plan`; up to three buckets are in flight. None: 8 MiB on CPUs, else 32 MiB.
        publish: Gives what the ranks must agree on besides; called if there are other ranks.
        workspace: Where shards and results lie while a bucket is worked on.

    Attributes:
        replicas: Who holds the same part of each matrix.
        replicas_of_adamw: Likewise of the parameters that are not matrices.
        weights_of_adamw: Their weights, see `Replicas`.
        tolerance_of_adamw: Up to which part of their sum over the ranks weighted norms are rounding.
        number: How many were planned in the process group before.
        group: Gives the process group that this was planned for; None if there is none, or it is gone.

    Raises:
        ValueError: On all ranks, if they disagree or the shards do not make up a matrix.
        RuntimeError: If not all ranks meet here.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        device: torch.device,
        bucket_bytes: int | None,
        publish: Callable[[], Published],
        workspace: Workspace,
    ) -> None:
        self.matrices = list(matrices)
        self.workspace = workspace
        self.device = device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if initialized() else (0, 1)
        default = CPU_BUCKET_BYTES if device.type == "cpu" else BUCKET_BYTES
        self.bucket_bytes = default if bucket_bytes is None else bucket_bytes
        self.group: Callable[[], Any] = weakref.ref(dist.group.WORLD) if initialized() else _no_group
        published, told = [self.matrices], list[Published]()
        if self.world_size > 1:
            mine, history = publish(), _HISTORY.setdefault(dist.group.WORLD, [0, -1])
            in_order, history[1] = mine.number > history[1], mine.number
            self.number, history[0] = history[0], history[0] + 1
            purpose = "compare their parameters before a step"
            every = self.gather((self.matrices, mine, self.bucket_bytes, in_order), purpose)
            published, told = [matrices for matrices, *_ in every], [theirs for _, theirs, *_ in every]
            for of_ranks in ([of_rank.adamw for of_rank in told], [of_rank.matrices for of_rank in told]):
                check_agreement([[(h.name, h.shape, h.dtype) for h in holdings] for holdings in of_ranks])
            check_order([in_order for *_, in_order in every])
            if len(bounds := {bound for _, _, bound, _ in every}) > 1:
                raise ValueError(
                    f"Expected the same bucket_bytes on all ranks but got {sorted(bounds)}. Set it alike on every rank."
                )
            check_hyper([of_rank.hyper for of_rank in told])
        self.plan = make_plan(published, self.bucket_bytes)
        if any(of_rank.compare for of_rank in told):
            for of_ranks in ([of_rank.matrices for of_rank in told], [of_rank.adamw for of_rank in told]):
                check_replicas(of_ranks)
        self.replicas, self.replicas_of_adamw = (
            [Replicas.of(self.rank, parts) for parts in zip(*of_ranks, strict=True)]
            for of_ranks in ([t.matrices for t in told], [t.adamw for t in told])
        )
        if not told:
            self.replicas = [Replicas(1, 0)] * len(matrices)
        self.weights_of_adamw, self.tolerance_of_adamw = (
            torch.tensor(numbers, dtype=torch.float64 if told else torch.float32, device=device)
            for numbers in (
                [replicas.weight for replicas in self.replicas_of_adamw],
                [
                    tolerance(replicas.count, parts.dtype) / replicas.count
                    for replicas, parts in zip(self.replicas_of_adamw, told[0].adamw if told else (), strict=True)
                ],
            )
        )
        self.holder_counts = [len(self.plan.holders(i)) for i in range(len(matrices))]
        self.buckets = [self._parcels(bucket) for bucket in self.plan.buckets]
        if not self.shared and device.type == "cpu":  # nothing travels, and what is small stays in the cache
            self.buckets = [[parcel] for bucket in self.buckets for parcel in bucket]
        self._ways_in = [self._way_in(bucket) for bucket in self.buckets]
        self._ways_back = [self._way_back(bucket) for bucket in self.buckets]

    @property
    def shared(self) -> bool:
        """Whether other ranks take part, so that all must take part in the same matrices."""
        return self.world_size > 1

    @cached_property
    def has_replicas(self) -> bool:
        """Whether any part of a parameter lies on more than one rank."""
        return any(replicas.count > 1 for replicas in (*self.replicas, *self.replicas_of_adamw))

    @property
    def is_current(self) -> bool:
        """Whether the default process group is the one that this was planned for."""
        return self.group() is current_group()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends in one `map` over all matrices."""
        total = 0
        for parcels, *legs in zip(self.buckets, self._ways_in, self._ways_back, strict=True):
            for _, place, region in (send for leg in legs for send in leg.sends):
                indices = parcels[place].indices
                total += len(indices) * region.numel * self.matrices[indices[0]].dtype.itemsize
        return total

    def contributes(self, index: int) -> bool:
        """Whether this rank's shard of a matrix counts in sums: replicas count once."""
        return self.plan.senders[index].get(self.matrices[index].region) == self.rank

    def sum(self, partials: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; the same bits on all of them."""
        if self.shared:
            with meeting("sum their statistics"):
                dist.all_reduce(partials)
        return partials

    def gather(self, value: Any, purpose: str) -> list[Any]:
        """Every rank's value (pickled), in the order of the ranks."""
        gathered: list[Any] = [None] * self.world_size
        with meeting(purpose):
            dist.all_gather_object(gathered, value)
        return gathered

    def map(
        self,
        chosen: Collection[int],
        shards: Callable[[tuple[int, ...]], Tensor],
        work: Callable[[Stacks], list[Tensor]],
    ) -> Iterator[Stacks]:
        """Apply work to whole matrices and give back this rank's shards of the results, bucket by bucket.

        The next bucket's communication runs while the caller and ``work`` compute on this one.

        Args:
            chosen: Matrices that take part: the same on all ranks, and all of them if there are other ranks.
            shards: Gives this rank's shards of some matrices as one tensor (K, ...), in their dtype; called once for
                each matrix, when it leaves.
            work: From stacks (K, rows, columns) of whole stored matrices to results of the same shapes and dtypes.
                Its inputs may be the shards themselves: it must not modify them.

        Both may give tensors of the workspace's current frame.

        Yields:
            For each bucket stacks (K, elements) of the flat local results; elements are 0 for empty shards. They are
            valid until the next.
        """
        buckets = [self._chosen(parcels, chosen) for parcels in self.buckets]
        if not self.shared:
            for parcels in buckets:
                with self.workspace.frame():
                    yield self._work_alone(parcels, shards, work)
            return
        arriving = self._depart(0, buckets[0], shards) if buckets else None
        returning: tuple[list[Parcel], dict[int, Tensor], _Leg, _InFlight] | None = None
        for number, parcels in enumerate(buckets):
            assert arriving is not None
            following = self._depart(number + 1, buckets[number + 1], shards) if number + 1 < len(buckets) else None
            whole = self._assemble(parcels, self._ways_in[number], *arriving)
            arriving = following  # what came is in the matrices now: its buffers are free while they are worked on
            with self.workspace.frame():
                results = work([(parcels[place].indices, stack) for place, stack in whole.items()])
                back = self._send_back(number, parcels, dict(zip(whole, results, strict=True)))
            del whole, results
            if returning is not None:
                yield self._deliver(*returning)
            returning = back
        if returning is not None:
            yield self._deliver(*returning)

    def _work_alone(
        self,
        parcels: list[Parcel],
        shards: Callable[[tuple[int, ...]], Tensor],
        work: Callable[[Stacks], list[Tensor]],
    ) -> Stacks:
        stacks = [
            (p.indices, shards(p.indices).view(len(p.indices), *self.matrices[p.indices[0]].shape)) for p in parcels
        ]
        return [(indices, result.flatten(1)) for (indices, _), result in zip(stacks, work(stacks), strict=True)]

    def _parcels(self, bucket: Sequence[int]) -> list[Parcel]:
        """Group a bucket's matrices that are of one kind and lie alike on every rank."""
        limit = CACHED_ELEMENTS if self.device.type == "cpu" else math.inf
        alike: dict[Any, list[list[int]]] = defaultdict(lambda: [[]])
        for index in bucket:
            matrix, plan = self.matrices[index], self.plan
            by_rank = tuple(regions[index] for regions in plan.regions)
            key = plan.owners[index], matrix.kind, matrix.shape, by_rank, tuple(plan.senders[index].items())
            if alike[key][-1] and (len(alike[key][-1]) + 1) * math.prod(matrix.shape) > limit:
                alike[key].append([])
            alike[key][-1].append(index)
        return [
            Parcel(tuple(indices), self.plan.owners[indices[0]], self.plan.senders[indices[0]])
            for portions in alike.values()
            for indices in portions
        ]

    def _chosen(self, parcels: list[Parcel], chosen: Collection[int]) -> list[Parcel]:
        members = [tuple(i for i in parcel.indices if i in chosen) for parcel in parcels]
        return [
            Parcel(indices, parcel.owner, parcel.senders)
            for parcel, indices in zip(parcels, members, strict=True)
            if indices
        ]

    def _way_in(self, parcels: Sequence[Parcel]) -> _Leg:
        sends, receives, needed = [], [], False
        for place, parcel in enumerate(parcels):
            for region, sender in parcel.senders.items():
                if sender == parcel.owner:
                    continue
                needed = True
                if sender == self.rank:
                    sends.append((parcel.owner, place, region))
                if parcel.owner == self.rank:
                    receives.append((sender, place, region))
        return _Leg(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _way_back(self, parcels: Sequence[Parcel]) -> _Leg:
        plan, sends, receives, needed = self.plan, [], [], False
        for place, parcel in enumerate(parcels):
            index, owner = parcel.indices[0], parcel.owner
            for rank in plan.holders(index):
                if rank == owner:
                    continue
                needed = True
                if owner == self.rank:
                    sends.append((rank, place, plan.regions[rank][index]))
                if rank == self.rank:
                    receives.append((owner, place, plan.regions[rank][index]))
        return _Leg(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _depart(
        self, number: int, parcels: list[Parcel], shards: Callable[[tuple[int, ...]], Tensor]
    ) -> tuple[dict[int, Tensor], _InFlight]:
        """Send what others own of a bucket; put what is owned here into matrices (K, rows, columns)."""
        leg, whole = self._ways_in[number], {}
        with self.workspace.frame():
            stacks = [shards(parcel.indices).flatten(1) for parcel in parcels]
            in_flight = self._start(leg, [stacks[place] for _, place, _ in leg.sends], parcels)
            for place, parcel in enumerate(parcels):
                if parcel.owner == self.rank:
                    matrix = self.matrices[parcel.indices[0]]
                    whole[place] = stacks[place].new_empty(len(parcel.indices), *matrix.shape)
                    _write(whole[place], matrix.region, stacks[place])
        return whole, in_flight

    def _start(self, leg: _Leg, pieces: list[Tensor], parcels: list[Parcel]) -> _InFlight:
        dtype = self.matrices[parcels[0].indices[0]].dtype if parcels else torch.float32
        if not leg.needed:
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            return _InFlight(None, nothing, nothing)
        sent = torch.cat([piece.reshape(-1) for piece in pieces] or [torch.empty(0, dtype=dtype, device=self.device)])
        in_sizes, out_sizes = [0] * self.world_size, [0] * self.world_size
        for peer, place, region in leg.sends:
            in_sizes[peer] += len(parcels[place].indices) * region.numel
        for peer, place, region in leg.receives:
            out_sizes[peer] += len(parcels[place].indices) * region.numel
        received = torch.empty(sum(out_sizes), dtype=dtype, device=self.device)
        with meeting("exchange matrices"):
            work = dist.all_to_all_single(received, sent, out_sizes, in_sizes, async_op=True)
        return _InFlight(work, received, sent)

    def _assemble(
        self, parcels: list[Parcel], leg: _Leg, whole: dict[int, Tensor], arriving: _InFlight
    ) -> dict[int, Tensor]:
        """Put what arrived into the owned matrices of a bucket."""
        for place, region, piece in _pieces(leg, parcels, arriving):
            _write(whole[place], region, piece)
        return whole

    def _send_back(
        self, number: int, parcels: list[Parcel], results: dict[int, Tensor]
    ) -> tuple[list[Parcel], dict[int, Tensor], _Leg, _InFlight]:
        leg = self._ways_back[number]
        in_flight = self._start(leg, [region.of(results[place]) for _, place, region in leg.sends], parcels)
        own = {
            place: self.matrices[parcels[place].indices[0]].region.of(result).flatten(1).clone()
            for place, result in results.items()
        }
        return parcels, own, leg, in_flight

    def _deliver(self, parcels: list[Parcel], own: dict[int, Tensor], leg: _Leg, arriving: _InFlight) -> Stacks:
        local = dict(own)
        for place, _, piece in _pieces(leg, parcels, arriving):
            local[place] = piece
        for place, parcel in enumerate(parcels):
            if place not in local:
                local[place] = torch.empty(len(parcel.indices), 0, device=self.device)
        return [(parcel.indices, local[place]) for place, parcel in enumerate(parcels)]


def _pieces(leg: _Leg, parcels: list[Parcel], arriving: _InFlight) -> Iterator[tuple[int, Region, Tensor]]:
    """Wait, then give (parcel's place, region, tensor (K, elements)) of everything that arrived."""
    if arriving.work is not None:
        with meeting("exchange matrices"):
            arriving.work.wait()
    counts = [len(parcels[place].indices) for _, place, _ in leg.receives]
    sizes = [count * region.numel for count, (_, _, region) in zip(counts, leg.receives, strict=True)]
    pieces = torch.split(arriving.received, sizes)
    for count, (_, place, region), piece in zip(counts, leg.receives, pieces, strict=True):
        yield place, region, piece.view(count, region.numel)


def _no_group() -> None:
    return None


def _peer(item: tuple[int, int, Region]) -> int:
    return item[0]


def _write(full: Tensor, region: Region, flat: Tensor) -> None:
    """Into stacked matrices (K, rows, columns), shards (K, elements)."""
    target = region.of(full)
    target.copy_(flat.view(target.shape))
