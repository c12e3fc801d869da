"""What a step would cost on many ranks, from the exchange's own assignment: no process is started, no weights are made.

A model is built on the meta device, each rank's regions follow from the mesh by arithmetic, and `assign`, which runs
in training too, says who owns, sends and receives what. Times follow from the rates that are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_namo.checkpoint.reading import first_few
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.groups import parameter_names
from lightning_namo.optim.stack import MatrixParameter
from lightning_namo.planning.memory import local_memory, peak_buffers
from lightning_namo.planning.simulated_mesh import SimulatedMesh
from lightning_namo.planning.traffic import BucketTraffic, overlapped, sent_and_received
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.routing.names import clean_name
from lightning_namo.sharding.assignment import Assignment, Matrix, assign
from lightning_namo.sharding.batch import BatchLayout, divide

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


def find_divided(
    optimizer: OrthogonalizedOptimizer, mesh: SimulatedMesh, divided: Mapping[str, int]
) -> dict[Tensor, int | None]:
    """For every parameter the dimension that tensor parallelism divides, by its name.

    Raises:
        ValueError: If the mesh has tensor-parallel ranks and there is none.
    """
    found: dict[Tensor, int | None] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(parameter_names(group), group["params"], strict=True):
            dims = (dim for glob, dim in divided.items() if fnmatchcase(f".{clean_name(name)}", glob))
            found[parameter] = next(dims, None) if mesh.tensor > 1 else None
    if mesh.tensor > 1 and all(dim is None for dim in found.values()):
        names = [name for group in optimizer.param_groups for name in parameter_names(group)]
        raise ValueError(
            f"Expected a model that {mesh.tensor} tensor-parallel ranks divide, by names like {', '.join(divided)}. "
            f"Got {first_few(names)}. Take another layout, or estimate(..., divided={{'glob': dimension}}) in Python."
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
    """A step of an optimizer on the ranks of a mesh.

    Args:
        mesh: The ranks.
        assignment: The exchange's.
        matrices: Whole, in the order of the assignment.
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

    mesh: SimulatedMesh
    assignment: Assignment
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
        return max(self.flops / self.mesh.ranks, *(float(matrix.cost) for matrix in self.matrices))

    @property
    def busiest(self) -> int:
        """FLOPs of the busiest rank."""
        return max(rank.flops for rank in self.ranks)

    @property
    def formula(self) -> float:
        """Bytes ``2 (R-1)/R * elements/R * itemsize`` that a rank sends on average where there are no replicas."""
        ranks = self.mesh.ranks
        return 2 * (ranks - 1) / ranks * sum(_bytes(matrix) for matrix in self.matrices) / ranks

    @property
    def overhead(self) -> float | None:
        """The overlapped step as a share of forward and backward passes and the step together."""
        if self.training_seconds is None:
            return None
        return self.overlapped_seconds / (self.training_seconds + self.overlapped_seconds)

    def as_dict(self, owners: bool = False) -> dict[str, Any]:
        """Plain numbers for JSON: all but the assignment, of which the owners if asked for."""
        words = ("reduced", "all_to_alls", "all_reduces", "elements", "flops", "bound", "busiest", "formula")
        times = ("compute_seconds", "communication_seconds", "overlapped_seconds", "training_seconds", "overhead")
        named = {matrix.name: owner for matrix, owner in zip(self.matrices, self.assignment.owners, strict=True)}
        return {
            "grid": asdict(self.mesh),
            **{word: getattr(self, word) for word in (*words, *times)},
            "matrices": len(self.matrices),
            "ranks": [asdict(rank) for rank in self.ranks],
            **({"owners": named} if owners else {}),
        }


def estimate(
    optimizer: OrthogonalizedOptimizer,
    mesh: SimulatedMesh,
    rates: Rates = Rates(),
    tokens_per_step: int | None = None,
    divided: Mapping[str, int] = DIVIDED,
    dtype: torch.dtype | None = None,
) -> Estimate:
    """Estimate a step on a mesh of ranks, from an optimizer whose parameters are whole on this process.

    Args:
        optimizer: Over a whole module, on the meta device if it is large; `bucket_bytes` is respected.
        mesh: The ranks.
        rates: For the times.
        tokens_per_step: Of all ranks, for the time of forward and backward passes.
        divided: From globs over names of parameters to the dimension that tensor parallelism divides.
        dtype: In which the ranks run the Newton-Schulz iteration, for the buffers. None: `iteration_dtype` of the
            parameters' device; for the meta device that is bfloat16, as on accelerators, unless the environment
            variable says otherwise. For ranks on CPUs give ``iteration_dtype("cpu")``.

    Raises:
        ValueError: If the mesh has tensor-parallel ranks and nothing to divide is found.
    """
    parameters, _, exchange = optimizer._prepare()
    dtype = dtype or iteration_dtype(exchange.device.type)
    dims, R = find_divided(optimizer, mesh, divided), mesh.ranks
    whole, parameters = divide_batches(exchange.matrices, parameters, mesh, dims)
    assignment = assign(published_matrices(whole, parameters, mesh, dims), exchange.bucket_bytes)
    traffic = [BucketTraffic.of(assignment, bucket, whole, R) for bucket in assignment.buckets]
    buffers = peak_buffers(optimizer, assignment, parameters, traffic, R, dtype)
    memory = local_memory(optimizer, mesh, dims)
    owned, flops = [0] * R, [0] * R
    for owner, matrix in zip(assignment.owners, whole, strict=True):
        owned[owner] += matrix.count
        flops[owner] += matrix.cost
    sent, received = ([sum(of_rank) for of_rank in zip(*lists, strict=True)] for lists in sent_and_received(traffic))
    ranks = tuple(map(Rank, owned, flops, sent, received, buffers, *memory))
    replicated = R > 1 and (mesh.replicas > 1 or (mesh.tensor > 1 and None in dims.values()))
    all_reduces, reduced = _all_reduces(optimizer, parameters, len(assignment.buckets), R, replicated)
    reducing = 2 * (R - 1) / R * reduced / rates.link_gbytes / 1e9
    sending = [bucket.shard_seconds(rates.link_gbytes) for bucket in traffic]
    returning = [bucket.result_seconds(rates.link_gbytes) for bucket in traffic]
    working = [max(bucket.flops) / rates.tflops / 1e12 for bucket in traffic]
    elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    rate = rates.peak_tflops * 1e12 * rates.model_flops_utilization * R
    return Estimate(
        mesh,
        assignment,
        whole,
        elements,
        ranks,
        reduced,
        sum((max(bucket.shards_sent) > 0) + (max(bucket.results_sent) > 0) for bucket in traffic),
        all_reduces if R > 1 else 0,
        sum(working),
        sum(sending) + sum(returning) + reducing,
        reducing + overlapped(sending, working, returning),
        None if tokens_per_step is None else 6 * elements * tokens_per_step / rate,
    )


def divide_batches(
    whole: Sequence[Matrix],
    parameters: Sequence[MatrixParameter],
    mesh: SimulatedMesh,
    divided: Mapping[Tensor, int | None],
) -> tuple[tuple[Matrix, ...], list[MatrixParameter]]:
    """The matrices and their parameters, batched ones in the parts that the ranks of a mesh would make of them."""
    matrices: list[Matrix] = []
    found: list[MatrixParameter] = []
    for matrix, parameter in zip(whole, parameters, strict=True):
        if parameter.part is None:
            matrices.append(matrix)
            found.append(parameter)
            continue
        of, dim = parameter.part.of, divided[parameter.tensor]

        def on(shard: int, tensor: int, of: BatchLayout = of, dim: int | None = dim) -> BatchLayout:
            return replace(of, region=mesh.region(of.shape, shard, tensor, dim))

        for first, last in divide(mesh.each(on)):
            part = of.part(first, last)
            name = matrix.name if part.count == of.count else f"{matrix.name}[{first}:{last}]"
            found.append(replace(parameter, name=name, part=part))
            cost = matrix.cost * part.count // of.count
            matrices.append(replace(matrix, name=name, cost=cost, count=part.count))
    return tuple(matrices), found


def published_matrices(
    whole: Sequence[Matrix],
    parameters: Sequence[MatrixParameter],
    mesh: SimulatedMesh,
    divided: Mapping[Tensor, int | None],
) -> list[list[Matrix]]:
    """What every rank of a mesh would publish of the matrices.

    Args:
        whole: The matrices, with any region.
        parameters: Their parameters.
        mesh: The ranks.
        divided: The dimension of each parameter that tensor parallelism divides.
    """

    def of(shard: int, tensor: int) -> list[Matrix]:
        known: dict[tuple[Any, ...], Any] = {}
        rows = []
        for matrix, parameter in zip(whole, parameters, strict=True):
            part, dim = parameter.part, divided[parameter.tensor]
            shape = (parameter.layout if part is None else part.of).shape
            key = shape, dim, *(() if part is None else (part.first, part.last))
            if key not in known:
                region = known[key] = mesh.region(shape, shard, tensor, dim)
                if part is not None:
                    known[key] = replace(part.of, region=region).part(part.first, part.last).layout.region
            rows.append(replace(matrix, region=known[key], kind=()))
        return rows

    return mesh.each(of)


def _all_reduces(
    optimizer: OrthogonalizedOptimizer,
    parameters: Sequence[MatrixParameter],
    buckets: int,
    ranks: int,
    replicated: bool,
) -> tuple[int, int]:
    """Number of all-reduces of a step, and their bytes.

    The first has what the rule asks for first of all, or ``||G||^2``, and a flag of each parameter, two numbers of each
    rank, and where there are replicas, in float64, one number more of each matrix and two of the others.
    """
    groups = [group["params"] for group in optimizer.param_groups if not group["orthogonalize"]]
    itemsize = 8 if any(parameter.tensor.dtype == torch.float64 for parameter in parameters) else 4
    kinds = {(id(p.group), p.layout.shape): p for p in parameters}
    of_kind = {kind: optimizer.requests(parameter) for kind, parameter in kinds.items()}
    requests = [of_kind[id(p.group), p.layout.shape] for p in parameters]
    first = [
        p.count * (r.sums[0] if r.sums_first else len(p.layout.blocks))
        for r, p in zip(requests, parameters, strict=True)
    ]
    matrices = sum(p.count for p in parameters)
    numbers = sum(first) + matrices
    numbers += sum(1 + 2 * len(params) for params in groups if params) + 2 * ranks
    if replicated:
        numbers += matrices + 2 * sum(map(len, groups))
    size = numbers * (8 if replicated else itemsize)
    size += itemsize * sum(p.count * sum(r.sums[r.sums_first :]) for r, p in zip(requests, parameters, strict=True))
    leading = max(r.leading - r.sums_first for r in requests)
    later = max(r.kinds[r.leading :].count("sum") for r in requests)
    return 1 + leading + later * buckets, size


def _bytes(matrix: Matrix) -> int:
    return matrix.count * math.prod(matrix.shape) * matrix.dtype.itemsize
