"""The memory that a step would take on each rank, from the assignment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim.engine import MatrixParameter, OrthogonalizedOptimizer, wire_dtype
from lightning_namo.planning.simulated_mesh import SimulatedMesh
from lightning_namo.planning.traffic import BucketTraffic
from lightning_namo.sharding.assignment import Assignment

SVD_WORKSPACE = 9.0
"""What the exact polar factor takes at most, times its argument, measured on a CPU."""


def peak_buffers(
    assignment: Assignment,
    parameters: Sequence[MatrixParameter],
    traffic: Sequence[BucketTraffic],
    ranks: int,
    dtype: torch.dtype,
) -> list[int]:
    """By rank: the most bytes in use at a time in `Exchange.map` and what it calls."""
    of_buckets = [_Scratch.of(assignment, parameters, bucket, ranks, dtype) for bucket in assignment.buckets]
    peaks = [0] * ranks
    for rank in range(ranks):
        none = _Scratch.none()
        scratch = [none, *(of_rank[rank] for of_rank in of_buckets), none]
        if ranks == 1:
            peaks[rank] = max(s.shards + max(s.elementwise, s.owned + max(s.working, s.applied)) for s in scratch)
            continue
        there = [0, *(bucket.shards_sent[rank] + bucket.shards_received[rank] for bucket in traffic), 0]
        there = [s.owned + moving for s, moving in zip(scratch, there, strict=True)]
        back = [0, *(bucket.results_sent[rank] + bucket.results_received[rank] for bucket in traffic), 0]
        back = [s.own + moving for s, moving in zip(scratch, back, strict=True)]
        for k in range(len(traffic) + 1):  # bucket k is orthogonalized, k + 1 is sent, results of k - 1 are returned
            following = scratch[k + 1]
            left = back[k - 1] if k else 0
            departing = there[k] + following.shards + max(following.elementwise, there[k + 1])
            at_work = there[k + 1] + 2 * scratch[k].owned + max(scratch[k].working, back[k])
            applied = there[k + 1] + back[k] + (scratch[k - 1].applied if k else 0)
            peaks[rank] = max(peaks[rank], left + max(departing, at_work, applied))
    return peaks


@dataclass(frozen=True)
class _Scratch:
    """Bytes of one bucket on one rank."""

    shards: int  # local directions, in the wire dtype
    elementwise: int  # stacked gradients and momenta, and what is made of them
    owned: int  # whole matrices
    own: int  # the local part of the results of those
    working: int  # the iteration beside its argument and its results
    applied: int  # polar factors in the dtype of the statistics, and stacked weights

    @classmethod
    def none(cls) -> _Scratch:
        return cls(0, 0, 0, 0, 0, 0)

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        parameters: Sequence[MatrixParameter],
        bucket: Sequence[int],
        ranks: int,
        dtype: torch.dtype,
    ) -> list[_Scratch]:
        """By rank, where the iteration runs in dtype."""
        shards, owned, own = ([0] * ranks for _ in range(3))
        stacks: dict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
        for index in bucket:
            itemsize, owner = wire_dtype(parameters[index]).itemsize, assignment.owners[index]
            owned[owner] += math.prod(parameters[index].layout.stored) * itemsize
            own[owner] += assignment.regions[owner][index].numel * itemsize
            for rank in range(ranks):
                shards[rank] += assignment.regions[rank][index].numel * itemsize
            stacks[owner, parameters[index].layout.stored].append(index)
        elementwise, applied, working = ([0] * ranks for _ in range(3))
        squares: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for (owner, _), indices in stacks.items():
            copies = (0, 0) if len(indices) == 1 else (2, 1)  # a single matrix is not copied
            for rank in range(ranks):
                local = sum(assignment.regions[rank][i].numel * parameters[i].tensor.itemsize for i in indices)
                elementwise[rank] = max(elementwise[rank], (2 + copies[0]) * local)
                applied[rank] = max(applied[rank], (1 + copies[1]) * local)
            for m, n in (shape for i in indices for shape in parameters[i].layout.matrix_shapes):
                short, wire = min(m, n), wire_dtype(parameters[indices[0]])
                squares[owner][short] += (m * n + 4 * short * short) * dtype.itemsize
                if dtype != wire:  # it ends in a tensor of its own; the results are made after the squares are freed
                    squares[owner][short] += m * n * (dtype.itemsize - wire.itemsize)
            if parameters[indices[0]].group["orthogonalizer"] == "svd":
                sizes = [math.prod(parameters[i].layout.stored) * parameters[i].tensor.itemsize for i in indices]
                working[owner] = max(working[owner], int(SVD_WORKSPACE * sum(sizes)))
        for owner, of_shorts in squares.items():
            working[owner] = max(working[owner], *of_shorts.values())
        return [cls(*sizes) for sizes in zip(shards, elementwise, owned, own, working, applied, strict=True)]


def local_memory(
    optimizer: OrthogonalizedOptimizer, mesh: SimulatedMesh, divided: Mapping[Tensor, int | None]
) -> tuple[list[int], ...]:
    """By rank: bytes of parameters, gradients, state, and AdamW's state; every rank holds all statistics."""
    kinds: dict[tuple[Any, ...], tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    fixed = 0
    for parameter, dim in divided.items():
        state = optimizer.state[parameter].values()
        like = sum(value.itemsize for value in state if value.shape == parameter.shape)
        fixed += sum(value.nbytes for value in state if value.shape != parameter.shape)
        key, itemsize = (tuple(parameter.shape), dim), parameter.itemsize
        sums = kinds[key]
        kinds[key] = sums[0] + itemsize, sums[1] + like, sums[2] + 2 * itemsize

    def of(shard: int, part: int) -> tuple[int, int, int]:
        numels = [mesh.region(shape, shard, part, dim).numel for shape, dim in kinds]
        weights, like, adamw = (
            sum(numel * kind[i] for numel, kind in zip(numels, kinds.values(), strict=True)) for i in range(3)
        )
        return weights, like + fixed, adamw

    weights, state, adamw = (list(column) for column in zip(*mesh.each(of), strict=True))
    return weights, weights, state, adamw
