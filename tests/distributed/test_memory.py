"""What a step needs above parameters, gradients and state is bounded by the buckets, not by the model."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from tests.helpers.iteration import ITERATIONS
from tests.helpers.launch import run_ranks
from tests.helpers.memory import bucket, peak_of_a_step


def peaks(rank: int) -> dict[tuple[str, bool, int], int]:
    """By dtype of the iteration, whether the matrices are replicated, and their number."""
    kinds = [False] if torch.distributed.get_world_size() == 1 else [False, True]
    cases = itertools.product(ITERATIONS, kinds, (24, 72))
    return {
        (dtype, replicated, count): peak_of_a_step(rank, count, dtype, replicated) for dtype, replicated, count in cases
    }


@functools.cache
def measured(world_size: int) -> list[dict[tuple[str, bool, int], int]]:
    return run_ranks(peaks, world_size)


@pytest.mark.parametrize(
    ("world_size", "replicated", "iteration", "most"),
    [
        (1, False, "bfloat16", 8),
        # Half a bucket less where the CPU has no products in bfloat16, which take memory of their own.
        pytest.param(2, False, "bfloat16", 11.25, marks=pytest.mark.slow),
        pytest.param(2, True, "bfloat16", 11.75, marks=pytest.mark.slow),
        (1, False, "float32", 13.5),
        pytest.param(2, False, "float32", 17, marks=pytest.mark.slow),
        pytest.param(2, True, "float32", 17.5, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_a_step_is_bounded_by_the_buckets_and_not_by_the_model(
    world_size: int, replicated: bool, iteration: str, most: float
) -> None:
    few, many = (
        max(of_rank[iteration, replicated, count] for of_rank in measured(world_size)) / bucket(iteration)
        for count in (24, 72)
    )
    how = f"{'replicas' if replicated else 'shards'} on {world_size} ranks, {iteration}"
    print(f"{how}: {few:.1f} buckets for 24 matrices, {many:.1f} for 72")
    assert many <= 1.1 * few
    assert many <= most
