"""What a step would cost on many ranks, from the exchange's own plan: no process is started, no weights are made.

A model is built on the meta device, each rank's regions follow from the mesh by arithmetic, and `make_plan`, which runs
in training too, says who owns, sends and receives what. Times follow from the rates that are given.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor

from lightning_namo.base import Entry, OrthogonalizedOptimizer, wire_dtype
from lightning_namo.grid import Grid
from lightning_namo.grouped import parameter_names
from lightning_namo.optimizers import AdaMuon
from lightning_namo.orthogonalize import iteration_dtype
from lightning_namo.param_groups import clean_name
from lightning_namo.plan import Matrix, Plan, make_plan
from lightning_namo.regions import Block

DIVIDED = {  # by tensor parallelism, over which dimension
    "*.attn.c_attn.*": 0,
    "*.attn.c_proj.weight": 1,
    "*.mlp.c_fc.*": 0,
    "*.mlp.c_proj.weight": 1,
    "*.attention.w[qkv].weight": 0,
    "*.attention.wo.weight": 1,
    "*.feed_forward.w[13].weight": 0,
    "*.feed_forward.w2.weight": 1,
}
"""Globs over the names of `gpt2.parallel`, and of Llama's (divided likewise: Shoeybi et al. 2019, arXiv 1909.08053)."""

SVD_WORKSPACE = 9.0
"""What the exact polar factor takes at most, times its argument, measured on a CPU."""


def find_divided(
    optimizer: OrthogonalizedOptimizer, grid: Grid, divided: Mapping[str, int]
) -> dict[Tensor, int | None]:
    """For every parameter the dimension that tensor parallelism divides, by its name.

    Raises:
        ValueError: If the grid has tensor-parallel ranks and there is none.
    """
    found: dict[Tensor, int | None] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(parameter_names(group), group["params"], strict=True):
            dims = (dim for glob, dim in divided.items() if fnmatchcase(f".{clean_name(name)}", glob))
            found[parameter] = next(dims, None) if grid.tensor > 1 else None
    if grid.tensor > 1 and all(dim is None for dim in found.values()):
        raise ValueError(
            f"Expected a model that {grid.tensor} tensor-parallel ranks divide, by names like {', '.join(divided)}. "
            "Got none of them. Take another layout, or estimate(..., divided={'glob': dimension}) in Python."
        )
    return found


@dataclass(frozen=True)
class Rates:
    """What times follow from.

    Args:
        link_gbytes: GB/s that a rank sends, and receives at the same time.
        tflops: TFLOP/s of a rank in the bfloat16 iteration, achieved.
        peak_tflops: TFLOP/s of a rank at best; 989 is the H100's for dense bfloat16 matrices.
        model_flops_utilization: Share of the peak that training reaches, as a fraction.
    """

    link_gbytes: float = 50.0
    tflops: float = 400.0
    peak_tflops: float = 989.0
    model_flops_utilization: float = 0.4


@dataclass(frozen=True)
class Rank:
    """One rank's part in a step; all but the first two in bytes.

    Args:
        matrices: How many it owns.
        flops: Of their orthogonalization.
        sent: In the all-to-alls.
        received: Likewise.
        buffers: Highest sum of the exchange's and the iteration's buffers, above parameters, gradients and state.
        parameters: Of the local shards.
        gradients: Likewise.
        state: Of this optimizer.
        adamw_state: Of AdamW in its place.
    """

    matrices: int
    flops: int
    sent: int
    received: int
    buffers: int
    parameters: int
    gradients: int
    state: int
    adamw_state: int


@dataclass(frozen=True)
class Estimate:
    """A step of an optimizer on the ranks of a grid.

    Args:
        grid: The ranks.
        plan: The exchange's.
        matrices: Whole, in the order of the plan.
        elements: Of all parameters.
        ranks: By rank.
        reduced: Bytes of the all-reduces.
        all_to_alls: How many a step has.
        all_reduces: Likewise.
        compute_seconds: Of the orthogonalization where each bucket waits for its busiest rank.
        communication_seconds: Of all-to-alls and all-reduces, each waiting for the rank with the most bytes.
        overlapped_seconds: Of the step, communication running beside the computation as `Exchange.map` lets it.
        training_seconds: Of forward and backward passes: 6 FLOPs per parameter and token. None without tokens.
    """

    grid: Grid
    plan: Plan
    matrices: tuple[Matrix, ...]
    elements: int
    ranks: tuple[Rank, ...]
    reduced: int
    all_to_alls: int
    all_reduces: int
    compute_seconds: float
    communication_seconds: float
    overlapped_seconds: float
    training_seconds: float | None

    @property
    def flops(self) -> int:
        """Of orthogonalizing every matrix once."""
        return sum(matrix.cost for matrix in self.matrices)

    @property
    def bound(self) -> float:
        """FLOPs below which no plan can bring the busiest rank: an even share, or the largest matrix."""
        return max(self.flops / self.grid.ranks, *(float(matrix.cost) for matrix in self.matrices))

    @property
    def busiest(self) -> int:
        """FLOPs of the busiest rank."""
        return max(rank.flops for rank in self.ranks)

    @property
    def formula(self) -> float:
        """Bytes ``2 (R-1)/R * elements/R * itemsize`` that a rank sends on average where there are no replicas."""
        ranks = self.grid.ranks
        return 2 * (ranks - 1) / ranks * sum(_bytes(matrix) for matrix in self.matrices) / ranks

    @property
    def overhead(self) -> float | None:
        """The overlapped step as a share of forward and backward passes and the step together."""
        if self.training_seconds is None:
            return None
        return self.overlapped_seconds / (self.training_seconds + self.overlapped_seconds)

    def as_dict(self, owners: bool = False) -> dict[str, Any]:
        """Plain numbers for JSON: all but the plan, of which the owners if asked for."""
        words = ("reduced", "all_to_alls", "all_reduces", "elements", "flops", "bound", "busiest", "formula")
        times = ("compute_seconds", "communication_seconds", "overlapped_seconds", "training_seconds", "overhead")
        named = {matrix.name: owner for matrix, owner in zip(self.matrices, self.plan.owners, strict=True)}
        return {
            "grid": asdict(self.grid),
            **{word: getattr(self, word) for word in (*words, *times)},
            "matrices": len(self.matrices),
            "ranks": [asdict(rank) for rank in self.ranks],
            **({"owners": named} if owners else {}),
        }


def estimate(
    optimizer: OrthogonalizedOptimizer,
    grid: Grid,
    rates: Rates = Rates(),
    tokens_per_step: int | None = None,
    divided: Mapping[str, int] = DIVIDED,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Plan the exchange of an optimizer whose parameters lie whole on this process, as if they were on a grid.

    Args:
        optimizer: Over a whole module, on the meta device if it is large; `bucket_bytes` is respected.
        grid: The ranks.
        rates: For the times.
        tokens_per_step: Of all ranks, for the time of forward and backward passes.
        divided: From globs over names of parameters to the dimension that tensor parallelism divides.
        dtype: In which the ranks run the Newton-Schulz iteration, for the buffers. None: `iteration_dtype` of the
            parameters' device; for the meta device that is bfloat16, as on accelerators, unless the environment
            variable says otherwise. For ranks on CPUs give ``iteration_dtype("cpu")``.

    Raises:
        ValueError: If the grid has tensor-parallel ranks and nothing to divide is found.
    """
    entries, _, exchange = optimizer._plan()
    dtype = dtype or iteration_dtype(exchange.device.type)
    whole, R = tuple(exchange.matrices), grid.ranks
    dims = find_divided(optimizer, grid, divided)
    plan = make_plan(publish(whole, entries, grid, dims), exchange.bucket_bytes)
    legs = [_Legs.of(plan, bucket, whole, R) for bucket in plan.buckets]
    buffers = _peak_buffers(plan, entries, legs, R, dtype)
    memory = _memory(optimizer, grid, dims)
    owned, flops = [0] * R, [0] * R
    for owner, matrix in zip(plan.owners, whole, strict=True):
        owned[owner] += 1
        flops[owner] += matrix.cost
    sent, received = ([sum(of_rank) for of_rank in zip(*lists, strict=True)] for lists in _by_bucket(legs))
    ranks = tuple(map(Rank, owned, flops, sent, received, buffers, *memory))
    replicated = R > 1 and (grid.replicas > 1 or (grid.tensor > 1 and None in dims.values()))
    all_reduces, reduced = _all_reduces(optimizer, entries, len(plan.buckets), R, replicated)
    reducing = 2 * (R - 1) / R * reduced / rates.link_gbytes / 1e9
    ways_in, ways_back = [leg.seconds_in(rates) for leg in legs], [leg.seconds_back(rates) for leg in legs]
    working = [max(leg.flops) / rates.tflops / 1e12 for leg in legs]
    elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    rate = rates.peak_tflops * 1e12 * rates.model_flops_utilization * R
    return Estimate(
        grid,
        plan,
        whole,
        elements,
        ranks,
        reduced,
        sum((max(leg.in_sent) > 0) + (max(leg.back_sent) > 0) for leg in legs),
        all_reduces if R > 1 else 0,
        sum(working),
        sum(ways_in) + sum(ways_back) + reducing,
        reducing + overlapped(ways_in, working, ways_back),
        None if tokens_per_step is None else 6 * elements * tokens_per_step / rate,
    )


def publish(
    whole: Sequence[Matrix], entries: Sequence[Entry], grid: Grid, divided: Mapping[Tensor, int | None]
) -> list[list[Matrix]]:
    """What every rank of a grid would publish of the matrices.

    Args:
        whole: The matrices, with any region.
        entries: Their parameters.
        grid: The ranks.
        divided: The dimension of each parameter that tensor parallelism divides.
    """

    def of(shard: int, part: int) -> list[Matrix]:
        known: dict[tuple[Any, ...], Block] = {}
        rows = []
        for matrix, entry in zip(whole, entries, strict=True):
            key = entry.layout.shape, divided[entry.parameter]
            if key not in known:
                known[key] = grid.region(key[0], shard, part, key[1])
            rows.append(Matrix(matrix.name, matrix.shape, matrix.dtype, matrix.cost, known[key]))
        return rows

    return grid.each(of)


@dataclass(frozen=True)
class _Legs:
    """Bytes on the two ways of one bucket, and FLOPs in between, by rank."""

    in_sent: list[int]
    in_received: list[int]
    back_sent: list[int]
    back_received: list[int]
    flops: list[int]

    @classmethod
    def of(cls, plan: Plan, bucket: Sequence[int], whole: Sequence[Matrix], ranks: int) -> _Legs:
        legs = cls(*([0] * ranks for _ in range(5)))
        for index in bucket:
            owner, itemsize = plan.owners[index], _itemsize(whole[index])
            legs.flops[owner] += whole[index].cost
            for region, sender in plan.senders[index].items():
                if sender != owner:
                    size = region.numel * itemsize
                    legs.in_sent[sender] += size
                    legs.in_received[owner] += size
            for rank, of_rank in enumerate(plan.regions):
                if rank != owner:
                    size = of_rank[index].numel * itemsize
                    legs.back_sent[owner] += size
                    legs.back_received[rank] += size
        return legs

    def seconds_in(self, rates: Rates) -> float:
        return max(*self.in_sent, *self.in_received) / rates.link_gbytes / 1e9

    def seconds_back(self, rates: Rates) -> float:
        return max(*self.back_sent, *self.back_received) / rates.link_gbytes / 1e9


def _by_bucket(legs: Sequence[_Legs]) -> tuple[list[list[int]], list[list[int]]]:
    sent = [one for leg in legs for one in (leg.in_sent, leg.back_sent)]
    return sent, [one for leg in legs for one in (leg.in_received, leg.back_received)]


def overlapped(ways_in: Sequence[float], working: Sequence[float], ways_back: Sequence[float]) -> float:
    """Seconds of the buckets' work and communication in the order of `Exchange.map`.

    Communications run one after another, beside the work; each starts when the work issued before it is done.
    """
    clock, link = 0.0, ways_in[0]  # where the work is, when the link is free
    arrived, returned = [link], []
    for k, seconds in enumerate(working):
        if k + 1 < len(ways_in):
            link = max(link, clock) + ways_in[k + 1]
            arrived.append(link)
        clock = max(clock, arrived[k]) + seconds
        link = max(link, clock) + ways_back[k]
        returned.append(link)
        if k:
            clock = max(clock, returned[k - 1])
    return max(clock, returned[-1])


def _peak_buffers(
    plan: Plan, entries: Sequence[Entry], legs: Sequence[_Legs], ranks: int, dtype: torch.dtype
) -> list[int]:
    """By rank: what lives at most in `Exchange.map` and what it calls."""
    of_buckets = [_Scratch.of(plan, entries, bucket, ranks, dtype) for bucket in plan.buckets]
    peaks = [0] * ranks
    for rank in range(ranks):
        none = _Scratch.none()
        scratch = [none, *(of_rank[rank] for of_rank in of_buckets), none]
        if ranks == 1:
            peaks[rank] = max(s.shards + max(s.elementwise, s.owned + max(s.working, s.applied)) for s in scratch)
            continue
        there = [0, *(leg.in_sent[rank] + leg.in_received[rank] for leg in legs), 0]
        there = [s.owned + moving for s, moving in zip(scratch, there, strict=True)]
        back = [0, *(leg.back_sent[rank] + leg.back_received[rank] for leg in legs), 0]
        back = [s.own + moving for s, moving in zip(scratch, back, strict=True)]
        for k in range(len(legs) + 1):  # bucket k is here, the one after it leaves for here, the one before goes home
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

    shards: int  # local directions, in the dtype that travels
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
        cls, plan: Plan, entries: Sequence[Entry], bucket: Sequence[int], ranks: int, dtype: torch.dtype
    ) -> list[_Scratch]:
        """By rank, where the iteration runs in dtype."""
        shards, owned, own = ([0] * ranks for _ in range(3))
        parcels: dict[tuple[int, tuple[int, int]], list[int]] = defaultdict(list)
        for index in bucket:
            itemsize, owner = wire_dtype(entries[index]).itemsize, plan.owners[index]
            owned[owner] += math.prod(entries[index].layout.stored) * itemsize
            own[owner] += plan.regions[owner][index].numel * itemsize
            for rank in range(ranks):
                shards[rank] += plan.regions[rank][index].numel * itemsize
            parcels[owner, entries[index].layout.stored].append(index)
        elementwise, applied, working = ([0] * ranks for _ in range(3))
        squares: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for (owner, _), indices in parcels.items():
            copies = (0, 0) if len(indices) == 1 else (2, 1)  # a single one is used as it lies
            for rank in range(ranks):
                local = sum(plan.regions[rank][i].numel * entries[i].parameter.itemsize for i in indices)
                elementwise[rank] = max(elementwise[rank], (2 + copies[0]) * local)
                applied[rank] = max(applied[rank], (1 + copies[1]) * local)
            for m, n in (shape for i in indices for shape in entries[i].layout.matrix_shapes):
                short, wire = min(m, n), wire_dtype(entries[indices[0]])
                squares[owner][short] += (m * n + 4 * short * short) * dtype.itemsize
                if dtype != wire:  # it ends in a tensor of its own; the results are made after the squares are freed
                    squares[owner][short] += m * n * (dtype.itemsize - wire.itemsize)
            if entries[indices[0]].group["orthogonalizer"] == "svd":
                sizes = [math.prod(entries[i].layout.stored) * entries[i].parameter.itemsize for i in indices]
                working[owner] = max(working[owner], int(SVD_WORKSPACE * sum(sizes)))
        for owner, of_shorts in squares.items():
            working[owner] = max(working[owner], *of_shorts.values())
        return [cls(*sizes) for sizes in zip(shards, elementwise, owned, own, working, applied, strict=True)]


def _memory(
    optimizer: OrthogonalizedOptimizer, grid: Grid, divided: Mapping[Tensor, int | None]
) -> tuple[list[int], ...]:
    """By rank: bytes of parameters, gradients, state, and AdamW's state; what is no shard lies on every rank."""
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
        numels = [grid.region(shape, shard, part, dim).numel for shape, dim in kinds]
        weights, like, adamw = (
            sum(numel * kind[i] for numel, kind in zip(numels, kinds.values(), strict=True)) for i in range(3)
        )
        return weights, like + fixed, adamw

    weights, state, adamw = (list(column) for column in zip(*grid.each(of), strict=True))
    return weights, weights, state, adamw


def _all_reduces(
    optimizer: OrthogonalizedOptimizer, entries: Sequence[Entry], buckets: int, ranks: int, replicated: bool
) -> tuple[int, int]:
    """Number of all-reduces of a step, and their bytes.

    The first has ``||G||^2``, ``||N||^2`` and flags of each parameter, two numbers of each rank, and where there are
    replicas, in float64, one number more of each matrix and two of the others.
    """
    numbers = sum(2 * math.prod(entry.layout.statistic_shape(optimizer.per_column)) + 1 for entry in entries)
    groups = [group["params"] for group in optimizer.param_groups if not group["orthogonalize"]]
    numbers += sum(1 + 2 * len(params) for params in groups if params) + 2 * ranks
    if replicated:
        numbers += len(entries) + 2 * sum(map(len, groups))
    itemsize = 8 if any(entry.parameter.dtype == torch.float64 for entry in entries) else 4
    size = numbers * (8 if replicated else itemsize)
    if not isinstance(optimizer, AdaMuon):
        return 1, size
    return 1 + buckets, size + itemsize * sum(math.prod(entry.layout.statistic_shape(False)) for entry in entries)


def _itemsize(matrix: Matrix) -> int:
    return cast(torch.dtype, getattr(torch, matrix.dtype.removeprefix("torch."))).itemsize


def _bytes(matrix: Matrix) -> int:
    return math.prod(matrix.shape) * _itemsize(matrix)
