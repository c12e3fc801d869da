"""What a step needs above parameters, gradients and state is bounded by the buckets, not by the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import profile

from lightning_namo import NAMO
from tests.distributed.launch import run_ranks

SIZE = 256  # of the square matrices: 128 KiB in bfloat16
BUCKET = 2 * SIZE * SIZE * 2  # two of them


def peak_bytes(step: object) -> int:
    """Highest sum of live allocations within a call, above what was live before it."""
    with profile(profile_memory=True) as profiler:
        step()  # type: ignore[operator]
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


def peak_of_a_step(rank: int, matrices: int, replicated: bool = False) -> int:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    parameters = []
    for _ in range(matrices):
        weight, grad = torch.randn(2, SIZE, SIZE)
        if not replicated:
            weight, grad = (distribute_tensor(whole, mesh, [Shard(0)]) for whole in (weight, grad))
        parameter = nn.Parameter(weight)
        parameter.grad = grad
        parameters.append(parameter)
    peaks = []
    for _ in range(3):
        optimizer = NAMO(parameters)
        optimizer.bucket_bytes = BUCKET
        optimizer.sharing()  # plans
        peaks.append(peak_bytes(optimizer.step))  # of a first step, without an arena: as on accelerators
    # gloo's threads free a buffer when they are done with it, later on a busy machine: the least is the step's.
    return min(peaks)


@pytest.mark.parametrize(("world_size", "replicated", "most"), [(1, False, 8), (2, False, 11), (2, True, 12.5)])
def test_peak_memory_of_a_step_is_bounded_by_the_buckets_and_not_by_the_model(
    world_size: int, replicated: bool, most: float
) -> None:
    few, many = (max(run_ranks(peak_of_a_step, world_size, count, replicated)) for count in (24, 72))
    how = "replicas" if replicated else "shards"
    print(f"{how} on {world_size} ranks: {few / BUCKET:.1f} buckets for 24 matrices, {many / BUCKET:.1f} for 72")
    assert many <= 1.1 * few
    assert many <= most * BUCKET
