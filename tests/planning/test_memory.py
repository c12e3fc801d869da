"""The memory of a step: estimated, and measured on real ranks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lightning_namo import NAMO
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.planning.cost_model import estimate
from lightning_namo.planning.simulated_mesh import SimulatedMesh
from tests.helpers.iteration import ITERATIONS, iterating_in
from tests.helpers.launch import run_ranks
from tests.helpers.memory import bucket, peak_of_a_step, size


def square_matrices(iteration: str, device: str = "meta") -> OrthogonalizedOptimizer:
    with torch.device(device):
        optimizer = NAMO([nn.Parameter(torch.empty(size(iteration), size(iteration))) for _ in range(24)])
    optimizer.bucket_bytes = bucket(iteration)
    return optimizer


def peaks(rank: int) -> dict[str, int]:
    return {iteration: peak_of_a_step(rank, 24, iteration) for iteration in ITERATIONS}


@functools.cache
def measured(world_size: int) -> list[dict[str, int]]:
    return run_ranks(peaks, world_size)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
@pytest.mark.parametrize("iteration", ITERATIONS)
def test_peak_buffers_are_within_a_tenth_of_measured_ones(iteration: str, world_size: int) -> None:
    result = estimate(
        square_matrices(iteration, "cpu"), SimulatedMesh.of("fsdp2", world_size), dtype=getattr(torch, iteration)
    )
    expected = max(rank.buffers for rank in result.ranks)
    assert expected == pytest.approx(max(peak[iteration] for peak in measured(world_size)), rel=0.1)


def test_buffers_are_those_of_the_iteration_that_the_environment_sets_and_of_bfloat16_by_default() -> None:
    grid, optimizer = SimulatedMesh.of("fsdp2", 2), square_matrices("float32")
    given = {name: estimate(optimizer, grid, dtype=getattr(torch, name)).ranks for name in ITERATIONS}
    assert given["float32"] != given["bfloat16"]
    for name, expected in ((None, "bfloat16"), *zip(ITERATIONS, ITERATIONS, strict=True)):
        with iterating_in(name):
            assert estimate(optimizer, grid).ranks == given[expected]
