"""Work on whole matrices, shared out over the ranks: shards are sent to one owner per matrix, which returns results.

Knows no optimizer and no parallel strategy: a layout is a `ShardRegion` per rank and matrix, the work is a function.
With one process everything is local and the same calls communicate nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.sharding.agreement import check_replicas, tolerance
from lightning_namo.sharding.assignment import Matrix, assign
from lightning_namo.sharding.layout import ShardRegion
from lightning_namo.sharding.process_group import collective, current_group, initialized, rank_and_world_size
from lightning_namo.sharding.publication import Published, Replicas, publish
from lightning_namo.workspace import Workspace

BUCKET_BYTES = 32 * 2**20  # by default; small matrices fill an accelerator in stacks only
CPU_BUCKET_BYTES = 8 * 2**20  # on CPUs, which one matrix keeps busy: less memory, more overlap of communication
CACHED_ELEMENTS = 2**20  # bound on a stack on CPUs, where larger ones leave the cache between operations


@dataclass(frozen=True)
class Stack:
    """Matrices that are laid out alike on every rank and have one owner: sent and orthogonalized as one tensor."""

    indices: tuple[int, ...]
    owner: int
    senders: dict[ShardRegion, int]


@dataclass
class _AllToAllSpec:
    """One all-to-all: what this rank sends and receives, each as (peer, index of the stack, region), sorted by peer."""

    sends: list[tuple[int, int, ShardRegion]]
    receives: list[tuple[int, int, ShardRegion]]
    needed: bool  # by any rank: all take part or none


@dataclass
class _InFlight:
    work: dist.Work | None
    received: Tensor
    sent: Tensor  # kept alive until the communication is over


StackedTensors: TypeAlias = list[
    tuple[tuple[int, ...], Tensor]
]  # indices of K matrices, and one tensor (K, ...) of them


class Exchange:
    """Runs work on whole matrices that are sharded over the ranks of the default process group.

    Building one is collective: all ranks must do it at the same point.

    Args:
        matrices: This rank's view of every matrix.
        device: Where tensors live.
        bucket_bytes: See `assign`; up to three buckets are in flight. None: 8 MiB on CPUs, else 32 MiB.
        describe: Gives what else the ranks must agree on; called if there are other ranks.
        workspace: Memory for shards and results while a bucket is worked on.

    Attributes:
        assignment: Who owns, sends and receives what.
        replicas: The replicas of each matrix.
        replicas_of_adamw: The replicas of each parameter that is not a matrix.
        weights_of_adamw: Their weights, see `Replicas`.
        tolerance_of_adamw: Weighted norms up to this fraction of their sum over the ranks are rounding.
        number: The number of exchanges made in the process group before.
        group: Gives the process group that this was made for; None if there is none, or it is gone.

    Raises:
        ValueError: On all ranks, if they disagree or the shards do not make up a matrix.
        RuntimeError: If not all ranks take part.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        device: torch.device,
        bucket_bytes: int | None,
        describe: Callable[[], Published],
        workspace: Workspace,
    ) -> None:
        self.matrices = list(matrices)
        self.workspace = workspace
        self.device = device
        self.rank, self.world_size = rank_and_world_size()
        default = CPU_BUCKET_BYTES if device.type == "cpu" else BUCKET_BYTES
        self.bucket_bytes = default if bucket_bytes is None else bucket_bytes
        self.group: Callable[[], Any] = weakref.ref(dist.group.WORLD) if initialized() else _no_group
        by_rank: list[Sequence[Matrix]] = [self.matrices]
        published: list[Published] = []
        if self.distributed:
            by_rank, published, self.number = publish(self.matrices, describe(), self.bucket_bytes)
        self.assignment = assign(by_rank, self.bucket_bytes)
        of_matrices, of_adamw = [p.matrices for p in published], [p.adamw for p in published]
        if any(p.compare for p in published):
            check_replicas(of_matrices)
            check_replicas(of_adamw)
        self.replicas, self.replicas_of_adamw = (
            [Replicas.of(self.rank, parts) for parts in zip(*of_ranks, strict=True)]
            for of_ranks in (of_matrices, of_adamw)
        )
        if not published:
            self.replicas = [Replicas(1, 0)] * len(matrices)
        bounds = [
            tolerance(replicas.count, description.dtype) / replicas.count
            for replicas, description in zip(self.replicas_of_adamw, of_adamw[0] if of_adamw else (), strict=True)
        ]
        wide = torch.float64 if published else torch.float32
        weights = [replicas.weight for replicas in self.replicas_of_adamw]
        self.weights_of_adamw = torch.tensor(weights, dtype=wide, device=device)
        self.tolerance_of_adamw = torch.tensor(bounds, dtype=wide, device=device)
        self.holder_counts = [len(self.assignment.holders(i)) for i in range(len(matrices))]
        self.buckets = [self._stacks(bucket) for bucket in self.assignment.buckets]
        if not self.distributed and device.type == "cpu":  # nothing is sent, and small stacks stay in the cache
            self.buckets = [[stack] for bucket in self.buckets for stack in bucket]
        self._shard_specs = [self._shards_spec(bucket) for bucket in self.buckets]
        self._result_specs = [self._results_spec(bucket) for bucket in self.buckets]

    @property
    def distributed(self) -> bool:
        """Whether other ranks take part, so that all must take part in the same matrices."""
        return self.world_size > 1

    @cached_property
    def has_replicas(self) -> bool:
        """Whether any part of a parameter is held by more than one rank."""
        return any(replicas.count > 1 for replicas in (*self.replicas, *self.replicas_of_adamw))

    @property
    def is_current(self) -> bool:
        """Whether the default process group is the one that this was made for."""
        return self.group() is current_group()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends in one `map` over all matrices."""
        total = 0
        for stacks, *specs in zip(self.buckets, self._shard_specs, self._result_specs, strict=True):
            for _, place, region in (send for spec in specs for send in spec.sends):
                indices = stacks[place].indices
                total += len(indices) * region.numel * self.matrices[indices[0]].dtype.itemsize
        return total

    def is_primary_replica(self, index: int) -> bool:
        """Whether this rank's shard of a matrix counts in sums: replicas count once."""
        return self.assignment.senders[index].get(self.matrices[index].region) == self.rank

    def sum(self, partials: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; the same bits on all of them."""
        if self.distributed:
            with collective("sum their statistics"):
                dist.all_reduce(partials)
        return partials

    def map(
        self,
        active: Collection[int],
        shards: Callable[[tuple[int, ...]], Tensor],
        work: Callable[[StackedTensors], list[Tensor]],
    ) -> Iterator[StackedTensors]:
        """Apply work to whole matrices and yield this rank's shards of the results, bucket by bucket.

        The next bucket's communication runs while the caller and ``work`` compute on this one.

        Args:
            active: Matrices that take part: the same on all ranks, and all of them if there are other ranks.
            shards: Gives this rank's shards of some matrices as one tensor (K, ...), in their dtype; called once for
                each matrix, when it is sent.
            work: From stacks (K, rows, columns) of whole stored matrices to results of the same shapes and dtypes.
                Its inputs may be the shards themselves: it must not modify them.

        Both may give tensors of the workspace's current frame.

        Yields:
            For each bucket stacks (K, elements) of the flat local results; elements are 0 for empty shards. They are
            valid until the next.
        """
        buckets = [self._active(stacks, active) for stacks in self.buckets]
        if not self.distributed:
            for stacks in buckets:
                with self.workspace.frame():
                    yield self._run_alone(stacks, shards, work)
            return
        arriving = self._send_shards(0, buckets[0], shards) if buckets else None
        returning: tuple[list[Stack], dict[int, Tensor], _AllToAllSpec, _InFlight] | None = None
        for number, stacks in enumerate(buckets):
            assert arriving is not None
            following = (
                self._send_shards(number + 1, buckets[number + 1], shards) if number + 1 < len(buckets) else None
            )
            whole = self._receive_shards(stacks, self._shard_specs[number], *arriving)
            arriving = following  # received shards are copied into the matrices: their buffers are free during the work
            with self.workspace.frame():
                results = work([(stacks[place].indices, stack) for place, stack in whole.items()])
                back = self._send_results(number, stacks, dict(zip(whole, results, strict=True)))
            del whole, results
            if returning is not None:
                yield self._receive_results(*returning)
            returning = back
        if returning is not None:
            yield self._receive_results(*returning)

    def _run_alone(
        self,
        stacks: list[Stack],
        shards: Callable[[tuple[int, ...]], Tensor],
        work: Callable[[StackedTensors], list[Tensor]],
    ) -> StackedTensors:
        whole = [
            (s.indices, shards(s.indices).view(len(s.indices), *self.matrices[s.indices[0]].shape)) for s in stacks
        ]
        return [(indices, result.flatten(1)) for (indices, _), result in zip(whole, work(whole), strict=True)]

    def _stacks(self, bucket: Sequence[int]) -> list[Stack]:
        """Group a bucket's matrices that are of one kind and laid out alike on every rank."""
        limit = CACHED_ELEMENTS if self.device.type == "cpu" else math.inf
        alike: dict[Any, list[list[int]]] = defaultdict(lambda: [[]])
        for index in bucket:
            matrix, assignment = self.matrices[index], self.assignment
            by_rank = tuple(regions[index] for regions in assignment.regions)
            owner, senders = assignment.owners[index], tuple(assignment.senders[index].items())
            key = owner, matrix.kind, matrix.shape, by_rank, senders
            if alike[key][-1] and (len(alike[key][-1]) + 1) * math.prod(matrix.shape) > limit:
                alike[key].append([])
            alike[key][-1].append(index)
        return [
            Stack(tuple(indices), self.assignment.owners[indices[0]], self.assignment.senders[indices[0]])
            for portions in alike.values()
            for indices in portions
        ]

    def _active(self, stacks: list[Stack], active: Collection[int]) -> list[Stack]:
        members = [tuple(i for i in stack.indices if i in active) for stack in stacks]
        return [
            Stack(indices, stack.owner, stack.senders)
            for stack, indices in zip(stacks, members, strict=True)
            if indices
        ]

    def _shards_spec(self, stacks: Sequence[Stack]) -> _AllToAllSpec:
        sends, receives, needed = [], [], False
        for place, stack in enumerate(stacks):
            for region, sender in stack.senders.items():
                if sender == stack.owner:
                    continue
                needed = True
                if sender == self.rank:
                    sends.append((stack.owner, place, region))
                if stack.owner == self.rank:
                    receives.append((sender, place, region))
        return _AllToAllSpec(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _results_spec(self, stacks: Sequence[Stack]) -> _AllToAllSpec:
        assignment, sends, receives, needed = self.assignment, [], [], False
        for place, stack in enumerate(stacks):
            index, owner = stack.indices[0], stack.owner
            for rank in assignment.holders(index):
                if rank == owner:
                    continue
                needed = True
                if owner == self.rank:
                    sends.append((rank, place, assignment.regions[rank][index]))
                if rank == self.rank:
                    receives.append((owner, place, assignment.regions[rank][index]))
        return _AllToAllSpec(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _send_shards(
        self, number: int, stacks: list[Stack], shards: Callable[[tuple[int, ...]], Tensor]
    ) -> tuple[dict[int, Tensor], _InFlight]:
        """Send the shards of a bucket to their owners; put those of owned matrices into tensors (K, rows, columns)."""
        spec, whole = self._shard_specs[number], {}
        with self.workspace.frame():
            local = [shards(stack.indices).flatten(1) for stack in stacks]
            in_flight = self._start(spec, [local[place] for _, place, _ in spec.sends], stacks)
            for place, stack in enumerate(stacks):
                if stack.owner == self.rank:
                    matrix = self.matrices[stack.indices[0]]
                    whole[place] = local[place].new_empty(len(stack.indices), *matrix.shape)
                    _write(whole[place], matrix.region, local[place])
        return whole, in_flight

    def _start(self, spec: _AllToAllSpec, pieces: list[Tensor], stacks: list[Stack]) -> _InFlight:
        dtype = self.matrices[stacks[0].indices[0]].dtype if stacks else torch.float32
        if not spec.needed:
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            return _InFlight(None, nothing, nothing)
        sent = torch.cat([piece.reshape(-1) for piece in pieces] or [torch.empty(0, dtype=dtype, device=self.device)])
        in_sizes, out_sizes = [0] * self.world_size, [0] * self.world_size
        for peer, place, region in spec.sends:
            in_sizes[peer] += len(stacks[place].indices) * region.numel
        for peer, place, region in spec.receives:
            out_sizes[peer] += len(stacks[place].indices) * region.numel
        received = torch.empty(sum(out_sizes), dtype=dtype, device=self.device)
        with collective("exchange matrices"):
            work = dist.all_to_all_single(received, sent, out_sizes, in_sizes, async_op=True)
        return _InFlight(work, received, sent)

    def _receive_shards(
        self, stacks: list[Stack], spec: _AllToAllSpec, whole: dict[int, Tensor], arriving: _InFlight
    ) -> dict[int, Tensor]:
        """Put received shards into the owned matrices of a bucket."""
        for place, region, piece in _pieces(spec, stacks, arriving):
            _write(whole[place], region, piece)
        return whole

    def _send_results(
        self, number: int, stacks: list[Stack], results: dict[int, Tensor]
    ) -> tuple[list[Stack], dict[int, Tensor], _AllToAllSpec, _InFlight]:
        spec = self._result_specs[number]
        in_flight = self._start(spec, [region.of(results[place]) for _, place, region in spec.sends], stacks)
        own = {
            place: self.matrices[stacks[place].indices[0]].region.of(result).flatten(1).clone()
            for place, result in results.items()
        }
        return stacks, own, spec, in_flight

    def _receive_results(
        self, stacks: list[Stack], own: dict[int, Tensor], spec: _AllToAllSpec, arriving: _InFlight
    ) -> StackedTensors:
        local = dict(own)
        for place, _, piece in _pieces(spec, stacks, arriving):
            local[place] = piece
        for place, stack in enumerate(stacks):
            if place not in local:
                local[place] = torch.empty(len(stack.indices), 0, device=self.device)
        return [(stack.indices, local[place]) for place, stack in enumerate(stacks)]


def _pieces(spec: _AllToAllSpec, stacks: list[Stack], arriving: _InFlight) -> Iterator[tuple[int, ShardRegion, Tensor]]:
    """Wait, then yield (index of the stack, region, tensor (K, elements)) of everything received."""
    if arriving.work is not None:
        with collective("exchange matrices"):
            arriving.work.wait()
    counts = [len(stacks[place].indices) for _, place, _ in spec.receives]
    sizes = [count * region.numel for count, (_, _, region) in zip(counts, spec.receives, strict=True)]
    pieces = torch.split(arriving.received, sizes)
    for count, (_, place, region), piece in zip(counts, spec.receives, pieces, strict=True):
        yield place, region, piece.view(count, region.numel)


def _no_group() -> None:
    return None


def _peer(item: tuple[int, int, ShardRegion]) -> int:
    return item[0]


def _write(full: Tensor, region: ShardRegion, flat: Tensor) -> None:
    """Into stacked matrices (K, rows, columns), shards (K, elements)."""
    target = region.of(full)
    target.copy_(flat.view(target.shape))
