"""The memory that a step takes, measured."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import profile

from lightning_namo import NAMO
from lightning_namo.polar.iteration_dtype import iteration_dtype
from tests.helpers.iteration import iterating_in


def size(iteration: str) -> int:
    """Rows of the square matrices, which need most: few in bfloat16 on CPUs that are 40 times as slow in it."""
    with iterating_in(None):
        slow = iteration == "bfloat16" and iteration_dtype("cpu") == torch.float32
    return 64 if slow else 256


def bucket(iteration: str) -> int:
    """Bytes of two of the matrices in bfloat16, in which they are sent."""
    return 2 * size(iteration) ** 2 * 2


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


def peak_of_a_step(rank: int, matrices: int, iteration: str, replicated: bool = False) -> int:
    """Bytes above parameters, gradients and state, where the iteration runs in the dtype of that name."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    torch.manual_seed(0)
    parameters = []
    for _ in range(matrices):
        weight, grad = torch.randn(2, size(iteration), size(iteration))
        if not replicated:
            weight, grad = (distribute_tensor(whole, mesh, [Shard(0)]) for whole in (weight, grad))
        parameter = nn.Parameter(weight)
        parameter.grad = grad
        parameters.append(parameter)
    peaks = []
    for _ in range(3):
        optimizer = NAMO(parameters)
        optimizer.bucket_bytes = bucket(iteration)
        optimizer.sharing()  # plans
        with iterating_in(iteration):
            peaks.append(peak_bytes(optimizer.step))  # of a first step, without an arena: as on accelerators
    # gloo's threads free a buffer when they are done with it, later on a busy machine: the least is the step's.
    return min(peaks)
