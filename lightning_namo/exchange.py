"""Sharing out whole-matrix work over the ranks: shards go to one owner per matrix, results come back as shards.

Knows no optimizer and no parallel strategy: a layout is a `Region` per rank and matrix, the work is a function. With
one process everything is local and the same calls communicate nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.plan import Described, Matrix, check_agreement, check_replicas, make_plan
from lightning_namo.regions import Region

DEFAULT_BUCKET_BYTES = 32 * 1024 * 1024


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
        bucket_bytes: See `make_plan`; up to three buckets are in flight.
        others: Parameters that do not travel, but must be the same on all ranks too.
        checksums: Gives a checksum of this rank's weights of each matrix; called if there are other ranks.

    Raises:
        ValueError: On all ranks, if they disagree or the shards do not make up a matrix.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        device: torch.device,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        others: Sequence[Described] = (),
        checksums: Callable[[], list[float]] = list,
    ) -> None:
        self.matrices = list(matrices)
        self.device = device
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
        published = [self.matrices]
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, (self.matrices, others, checksums()))
            published = [theirs for theirs, _, _ in gathered]
            check_agreement([theirs for _, theirs, _ in gathered])
        self.plan = make_plan(published, bucket_bytes)
        if self.world_size > 1:
            check_replicas(published, [theirs for _, _, theirs in gathered])
        self.holder_counts = [len(self.plan.holders(i)) for i in range(len(matrices))]
        self._ways_in = [self._way_in(bucket) for bucket in self.plan.buckets]
        self._ways_back = [self._way_back(bucket) for bucket in self.plan.buckets]

    @property
    def shared(self) -> bool:
        """Whether other ranks take part, so that all must take part in the same matrices."""
        return self.world_size > 1

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends in one `map` over all matrices."""
        sends = (send for leg in self._ways_in + self._ways_back for send in leg.sends)
        return sum(region.numel * _dtype(self.matrices[index]).itemsize for _, index, region in sends)

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
        dtype = _dtype(self.matrices[bucket[0]]) if bucket else torch.float32
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


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over the ranks, in place; the same bits on all of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def check_same(parameters: Sequence[Described]) -> None:
    """Raise on all ranks, by name, if they have different parameters. Collective where there are other ranks.

    Args:
        parameters: This rank's, each as name, full shape and dtype.
    """
    if dist.is_available() and dist.is_initialized():
        published: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(published, list(parameters))
        check_agreement(published)


def _dtype(matrix: Matrix) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, matrix.dtype.removeprefix("torch.")))


def _peer(item: tuple[int, int, Region]) -> int:
    return item[0]


def _write(full: Tensor, region: Region, flat: Tensor) -> None:
    target = region.of(full)
    target.copy_(flat.view(target.shape))
