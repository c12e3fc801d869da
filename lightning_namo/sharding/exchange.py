"""Work on whole matrices, shared out over the ranks: shards are sent to one owner per matrix, which returns results.

Knows no optimizer and no parallel strategy: a layout is a `ShardRegion` per rank and matrix, the work is a function.
With one process everything is local and the same calls communicate nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.sharding.agreement import check_replicas, tolerance
from lightning_namo.sharding.assignment import Matrix, assign
from lightning_namo.sharding.layout import ShardRegion
from lightning_namo.sharding.process_group import collective, current_group, initialized, rank_and_world_size
from lightning_namo.sharding.publication import Published, Replicas, publish
from lightning_namo.workspace import Workspace

BUCKET_SHARE = 256  # of an accelerator's memory, by default: few calls, and a step needs 11 to 17 buckets
BUCKET_BYTES = 320 * 2**20  # by default where its memory is not known: 1/256 of 80 GiB
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
    needed_by: set[int]  # stacks for which any rank needs it: all ranks take part or none


@dataclass
class _InFlight:
    work: dist.Work | None
    received: Tensor
    sent: Tensor  # kept alive until the communication is over


class Exchange:
    """Runs work on whole matrices that are sharded over the ranks of the default process group.

    Building one is collective: all ranks must do it at the same point.

    Args:
        matrices: This rank's view of every matrix.
        device: Where tensors live.
        bucket_bytes: See `assign`; up to three buckets are in flight. None: 8 MiB on
            CPUs, else a 256th of the accelerator's memory, the smallest of all ranks.
        describe: Gives what else the ranks must agree on; called if there are other ranks.
        workspace: Memory for shards and results while a bucket is worked on.
        batched: Whether many matrices are worked on together, as suits accelerators. None: on all devices but CPUs.

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
        batched: bool | None = None,
    ) -> None:
        self.matrices = list(matrices)
        self.workspace = workspace
        self.device = device
        self.rank, self.world_size = rank_and_world_size()
        self.batched = device.type != "cpu" if batched is None else batched
        default = bucket_bytes_by_default(device) if self.batched else CPU_BUCKET_BYTES
        self.bucket_bytes = default if bucket_bytes is None else bucket_bytes  # of other ranks may be smaller: below
        self.group: Callable[[], Any] = weakref.ref(dist.group.WORLD) if initialized() else _no_group
        by_rank: list[Sequence[Matrix]] = [self.matrices]
        published: list[Published] = []
        if self.distributed:
            told = publish(self.matrices, describe(), bucket_bytes, default)
            by_rank, published, self.number, self.bucket_bytes = told
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
        if not self.distributed and not self.batched:  # nothing is sent, and small stacks stay in the cache
            self.buckets = [[stack] for bucket in self.buckets for stack in bucket]
        self._shard_specs = [self._shards_spec(bucket) for bucket in self.buckets]
        self._result_specs = [self._results_spec(bucket) for bucket in self.buckets]
        self._dtypes = [self.matrices[bucket[0].indices[0]].dtype for bucket in self.buckets]

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
                members = [self.matrices[index] for index in stacks[place].indices]
                total += sum(m.count for m in members) * region.numel * members[0].dtype.itemsize
        return total

    def is_primary_replica(self, index: int) -> bool:
        """Whether this rank's shard of a matrix counts in sums: replicas count once."""
        return self.assignment.senders[index].get(self.matrices[index].region) == self.rank

    def start_sum(self, partials: Tensor) -> Callable[[], object]:
        """Start to sum a tensor over the ranks, in place, to the same bits; what is returned waits for it."""
        if not self.distributed:
            return _no_group
        with collective("sum their statistics"):
            work = dist.all_reduce(partials, async_op=True)

        def wait() -> None:
            with collective("sum their statistics"):
                work.wait()

        return wait

    def map(
        self,
        queue: deque[int],
        shards: Callable[[int], dict[int, Tensor]],
        work: Callable[[int, dict[int, Tensor]], dict[int, Tensor]],
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Apply work to whole matrices and yield this rank's shards of the results, bucket by bucket.

        The next bucket's communication runs while the caller and ``work`` compute on this one.

        Args:
            queue: Numbers of the buckets to do, the same on all ranks. The caller may put more into it meanwhile.
            shards: Gives this rank's shards of a bucket's stacks as tensors (K, ...), in their dtype, by their place in
                the bucket; stacks may be missing, the same on all ranks.
            work: From the places and stacks (K, rows, columns) of whole stored matrices that this rank owns to results
                of the same shapes and dtypes. Its inputs may be the shards themselves: it must not modify them.

        Both may give tensors of the workspace's current frame.

        Yields:
            The number of a bucket, and by place stacks (K, elements) of the flat local results; elements are 0 for
            empty shards. With one process they are valid until the next.
        """
        if not self.distributed:
            while queue:
                number = queue.popleft()
                with self.workspace.frame():
                    results = work(number, shards(number))
                    yield number, {place: result.flatten(1) for place, result in results.items()}
            return
        arriving, returning = self._next(queue, shards), None
        while arriving is not None or returning is not None or queue:
            following, back = self._next(queue, shards), None
            if arriving is not None:
                number, counts = arriving[:2]
                whole = self._receive_shards(*arriving)
                arriving = None  # received shards are in the matrices: their buffers are free during the work
                with self.workspace.frame():
                    back = self._send_results(number, counts, work(number, whole))
                del whole
            arriving = following
            if returning is not None:
                yield returning[0], self._receive_results(*returning)
            returning = back

    def to_owners(
        self, shards: Callable[[int], dict[int, Tensor]], dtype: torch.dtype
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Send shards to the owners of their matrices, bucket by bucket; nothing comes back.

        Args:
            shards: As for `map`, in the given dtype.
            dtype: In which they are sent.

        Yields:
            The number of a bucket, and by place the whole stored matrices (K, rows, columns) that this rank owns.
        """
        for number in range(len(self.buckets)):
            yield number, self._receive_shards(number, *self._send_shards(number, shards, dtype))

    def _next(
        self, queue: deque[int], shards: Callable[[int], dict[int, Tensor]]
    ) -> tuple[int, dict[int, int], dict[int, Tensor], _InFlight] | None:
        """Send the shards of the next bucket in the queue."""
        if not queue:
            return None
        number = queue.popleft()
        return (number, *self._send_shards(number, shards, self._dtypes[number]))

    def _stacks(self, bucket: Sequence[int]) -> list[Stack]:
        """Group a bucket's matrices that are of one kind and laid out alike on every rank."""
        limit = math.inf if self.batched else CACHED_ELEMENTS
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

    def _shards_spec(self, stacks: Sequence[Stack]) -> _AllToAllSpec:
        sends, receives, needed = [], [], set()
        for place, stack in enumerate(stacks):
            for region, sender in stack.senders.items():
                if sender == stack.owner:
                    continue
                needed.add(place)
                if sender == self.rank:
                    sends.append((stack.owner, place, region))
                if stack.owner == self.rank:
                    receives.append((sender, place, region))
        return _AllToAllSpec(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _results_spec(self, stacks: Sequence[Stack]) -> _AllToAllSpec:
        assignment, sends, receives, needed = self.assignment, [], [], set()
        for place, stack in enumerate(stacks):
            index, owner = stack.indices[0], stack.owner
            for rank in assignment.holders(index):
                if rank == owner:
                    continue
                needed.add(place)
                if owner == self.rank:
                    sends.append((rank, place, assignment.regions[rank][index]))
                if rank == self.rank:
                    receives.append((owner, place, assignment.regions[rank][index]))
        return _AllToAllSpec(sorted(sends, key=_peer), sorted(receives, key=_peer), needed)

    def _send_shards(
        self, number: int, shards: Callable[[int], dict[int, Tensor]], dtype: torch.dtype
    ) -> tuple[dict[int, int], dict[int, Tensor], _InFlight]:
        """Send the shards of a bucket to their owners; put those of owned matrices into tensors (K, rows, columns).

        Returns:
            How many matrices each stack has, by place; the owned ones; what is under way.
        """
        spec, stacks, whole = self._shard_specs[number], self.buckets[number], {}
        with self.workspace.frame():
            local = {place: tensor.flatten(1) for place, tensor in shards(number).items()}
            counts = {place: len(tensor) for place, tensor in local.items()}
            sent = {place: local[place] for _, place, _ in spec.sends if place in local}
            in_flight = self._start(spec, sent, counts, dtype)
            for place, tensor in local.items():
                if stacks[place].owner == self.rank:
                    matrix = self.matrices[stacks[place].indices[0]]
                    whole[place] = tensor.new_empty(len(tensor), *matrix.shape)
                    _write(whole[place], matrix.region, tensor)
        return counts, whole, in_flight

    def _start(
        self,
        spec: _AllToAllSpec,
        tensors: dict[int, Tensor],
        counts: dict[int, int],
        dtype: torch.dtype,
        cut: bool = False,
    ) -> _InFlight:
        """Start an all-to-all of a bucket's stacks.

        Args:
            spec: What goes where.
            tensors: What is sent of each stack, by place: all of it, or its regions.
            counts: How many matrices the stacks have that take part, by place.
            dtype: Of what is sent.
            cut: Whether regions are cut out of the tensors.
        """
        if not spec.needed_by.intersection(counts):
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            return _InFlight(None, nothing, nothing)
        sends = [send for send in spec.sends if send[1] in counts]
        pieces = [(region.of(tensors[place]) if cut else tensors[place]).reshape(-1) for _, place, region in sends]
        sent = torch.cat(pieces or [torch.empty(0, dtype=dtype, device=self.device)])
        in_sizes, out_sizes = [0] * self.world_size, [0] * self.world_size
        for sizes, pairs in ((in_sizes, sends), (out_sizes, spec.receives)):
            for peer, place, region in pairs:
                sizes[peer] += counts.get(place, 0) * region.numel
        received = torch.empty(sum(out_sizes), dtype=dtype, device=self.device)
        with collective("exchange matrices"):
            work = dist.all_to_all_single(received, sent, out_sizes, in_sizes, async_op=True)
        return _InFlight(work, received, sent)

    def _receive_shards(
        self, number: int, counts: dict[int, int], whole: dict[int, Tensor], arriving: _InFlight
    ) -> dict[int, Tensor]:
        """Put received shards into the owned matrices of a bucket."""
        for place, region, piece in _pieces(self._shard_specs[number], counts, arriving):
            _write(whole[place], region, piece)
        return whole

    def _send_results(
        self, number: int, counts: dict[int, int], results: dict[int, Tensor]
    ) -> tuple[int, dict[int, int], dict[int, Tensor], _InFlight]:
        in_flight = self._start(self._result_specs[number], results, counts, self._dtypes[number], cut=True)
        stacks = self.buckets[number]
        own = {
            place: self.matrices[stacks[place].indices[0]].region.of(result).flatten(1).clone()
            for place, result in results.items()
        }
        return number, counts, own, in_flight

    def _receive_results(
        self, number: int, counts: dict[int, int], own: dict[int, Tensor], arriving: _InFlight
    ) -> dict[int, Tensor]:
        local = dict(own)
        for place, _, piece in _pieces(self._result_specs[number], counts, arriving):
            local[place] = piece
        return {
            place: local[place] if place in local else torch.empty(count, 0, device=self.device)
            for place, count in counts.items()
        }


def _pieces(
    spec: _AllToAllSpec, counts: dict[int, int], arriving: _InFlight
) -> Iterator[tuple[int, ShardRegion, Tensor]]:
    """Wait, then yield (place of the stack, region, tensor (K, elements)) of everything received."""
    if arriving.work is not None:
        with collective("exchange matrices"):
            arriving.work.wait()
    receives = [(place, region) for _, place, region in spec.receives if place in counts]
    pieces = torch.split(arriving.received, [counts[place] * region.numel for place, region in receives])
    for (place, region), piece in zip(receives, pieces, strict=True):
        yield place, region, piece.view(counts[place], region.numel)


def bucket_bytes_by_default(device: torch.device) -> int:
    """A `BUCKET_SHARE`-th of an accelerator's memory, in MiB; `BUCKET_BYTES` where that is not known."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return BUCKET_BYTES
    _, total = torch.accelerator.get_memory_info(device)
    return max(1, total // BUCKET_SHARE // 2**20) * 2**20


def _no_group() -> None:
    return None


def _peer(item: tuple[int, int, ShardRegion]) -> int:
    return item[0]


def _write(full: Tensor, region: ShardRegion, flat: Tensor) -> None:
    """Into stacked matrices (K, rows, columns), shards (K, elements)."""
    target = region.of(full)
    target.copy_(flat.view(target.shape))
