"""The memory that a step would take on each rank, from the assignment."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.stack import MatrixParameter
from lightning_namo.planning.simulated_mesh import SimulatedMesh
from lightning_namo.planning.traffic import BucketTraffic
from lightning_namo.sharding.assignment import Assignment

SVD_WORKSPACE = 9.0
"""What the exact polar factor takes at most, times its argument, measured on a CPU."""


def peak_buffers(
    optimizer: OrthogonalizedOptimizer,
    assignment: Assignment,
    parameters: Sequence[MatrixParameter],
    traffic: Sequence[BucketTraffic],
    ranks: int,
    dtype: torch.dtype,
) -> list[int]:
    """By rank: the most bytes in use at a time in a step, above parameters, gradients and state."""
    known: dict[Any, Any] = {}

    def scratch_of(parameter: MatrixParameter, count: int) -> Any:
        key = id(parameter.group), parameter.layout.shape, parameter.tensor.dtype, count
        if key not in known:
            known[key] = optimizer.scratch(parameter, count)
        return known[key]

    of_buckets = [
        _Scratch.of(scratch_of, assignment, parameters, bucket, ranks, dtype) for bucket in assignment.buckets
    ]
    peaks = [0] * ranks
    for rank in range(ranks):
        none = _Scratch()
        scratch = [none, none, *(of_rank[rank] for of_rank in of_buckets), none]
        if ranks == 1:
            peaks[rank] = max(
                max(s.leading, s.shards + max(s.directing, s.held + s.owned + max(s.working, s.applied)))
                for s in scratch
            )
            continue
        there = [0, 0, *(bucket.shards_sent[rank] + bucket.shards_received[rank] for bucket in traffic), 0]
        there = [s.owned + s.held + moving for s, moving in zip(scratch, there, strict=True)]
        back = [0, 0, *(bucket.results_sent[rank] + bucket.results_received[rank] for bucket in traffic), 0]
        back = [s.own + s.held + moving for s, moving in zip(scratch, back, strict=True)]
        peaks[rank] = max(s.leading for s in scratch)
        for k in range(2, len(traffic) + 3):  # bucket k is orthogonalized, k + 1 is sent, k - 1 returned, k - 2 waits
            following = scratch[k + 1] if k + 1 < len(scratch) else none
            ahead = there[k + 1] if k + 1 < len(there) else 0
            left = back[k - 1] + (scratch[k - 2].waiting and back[k - 2] + scratch[k - 2].waiting)
            directing = there[k] + following.shards + max(following.directing, ahead)
            at_work = ahead + 2 * scratch[k].owned + scratch[k].held + max(scratch[k].working, back[k])
            applied = ahead + back[k] + max(scratch[k - 1].applied, scratch[k - 1].waiting + scratch[k - 2].applied)
            peaks[rank] = max(peaks[rank], left + max(directing, at_work, applied))
    return peaks


@dataclass
class _Scratch:
    """Bytes of one bucket on one rank; those of the rule as `trial.Scratch`, its stacks one after the other."""

    shards: int = 0  # local directions, in the wire dtype
    owned: int = 0  # whole matrices
    own: int = 0  # the local part of the results of those
    working: int = 0  # the iteration beside its argument and its results
    leading: int = 0
    directing: int = 0
    applied: int = 0
    held: int = 0  # of all stacks
    waiting: int = 0

    @classmethod
    def of(
        cls,
        scratch: Callable[[MatrixParameter, int], Any],
        assignment: Assignment,
        parameters: Sequence[MatrixParameter],
        bucket: Sequence[int],
        ranks: int,
        dtype: torch.dtype,
    ) -> list[_Scratch]:
        """By rank, where the iteration runs in dtype."""
        found = [cls() for _ in range(ranks)]
        stacks: dict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
        for index in bucket:
            itemsize = parameters[index].count * parameters[index].wire_dtype.itemsize
            owner = assignment.owners[index]
            found[owner].owned += math.prod(parameters[index].layout.stored) * itemsize
            found[owner].own += assignment.regions[owner][index].numel * itemsize
            for rank in range(ranks):
                found[rank].shards += assignment.regions[rank][index].numel * itemsize
            stacks[owner, parameters[index].layout.stored].append(index)
        squares: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for (owner, _), indices in stacks.items():
            first = parameters[indices[0]]
            of_rule = scratch(first, sum(parameters[i].count for i in indices))
            for rank in range(ranks):
                numel, one = sum(parameters[i].count * assignment.regions[rank][i].numel for i in indices), found[rank]
                one.leading = max(one.leading, round(of_rule.leading * numel))
                one.directing = max(one.directing, round(of_rule.directing * numel))
                one.applied = max(one.applied, round(of_rule.applied * numel))
                one.held += round(of_rule.held * numel)
                one.waiting += round(of_rule.waiting * numel)
            members = [parameters[i] for i in indices]
            shapes = [(member.count, shape) for member in members for shape in member.layout.matrix_shapes]
            for count, (m, n) in shapes:
                short, wire = min(m, n), first.wire_dtype
                squares[owner][short] += count * (m * n + 4 * short * short) * dtype.itemsize
                if dtype != wire:  # it ends in a tensor of its own; the results are made after the squares are freed
                    squares[owner][short] += count * m * n * (dtype.itemsize - wire.itemsize)
            if first.group["orthogonalizer"] == "svd":
                sizes = [count * m * n * first.tensor.itemsize for count, (m, n) in shapes]
                found[owner].working = max(found[owner].working, int(SVD_WORKSPACE * sum(sizes)))
        for owner, of_shorts in squares.items():
            found[owner].working = max(found[owner].working, *of_shorts.values())
        return found


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
