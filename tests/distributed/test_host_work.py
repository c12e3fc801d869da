"""The host's work in a sharded step grows with stacks and buckets, not with matrices: calls, counted in every rank."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from tests.helpers.launch import run_ranks
from tests.helpers.rules import BUILT_IN
from tests.optim.test_counts import calls, with_gradients

COUNTS = (32, 64)


def calls_of_steps(rank: int) -> dict[tuple[str, bool, int], int]:
    """By optimizer, whether the matrices are sharded, and their number."""
    mesh, found = init_device_mesh("cpu", (torch.distributed.get_world_size(),)), {}
    for cls in BUILT_IN:
        for sharded in (False, True):
            for count in COUNTS:
                optimizer = with_gradients(small_matrices(cls, count, mesh if sharded else None))
                optimizer.step()
                found[cls.__name__, sharded, count] = calls(optimizer.step).total()
    return found


def small_matrices(cls: type, count: int, mesh: object) -> OrthogonalizedOptimizer:
    whole = [torch.ones(16, 8) for _ in range(count)]
    optimizer: OrthogonalizedOptimizer = cls(
        [nn.Parameter(w if mesh is None else distribute_tensor(w, mesh, [Shard(0)])) for w in whole]
    )
    return optimizer


@functools.cache
def counted() -> list[dict[tuple[str, bool, int], int]]:
    return run_ranks(calls_of_steps, 2)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("cls", BUILT_IN)
def test_a_matrix_more_takes_at_most_five_python_calls(cls: type, sharded: bool) -> None:
    for of_rank in counted():
        few, many = (of_rank[cls.__name__, sharded, count] for count in COUNTS)
        assert many - few <= 5 * (COUNTS[1] - COUNTS[0])
