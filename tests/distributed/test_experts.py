"""Who works on experts, and what is sent for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lightning_namo import NAMO, build_optimizer
from lightning_namo.testing.layouts import Experts
from tests.helpers.launch import run_ranks
from tests.helpers.worker import Wire, counted


def work(rank: int, count: int, dim: int | None) -> tuple[int, list[int], int]:
    """Bytes that this rank sends in a step, how many experts each rank owns, and what the plan says it sends."""
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(Experts(count, 6, 4), Experts(count, 4, 6))
    if dim is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        module = fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(dim))
    optimizer = build_optimizer(module, NAMO)
    wire = Wire()
    for step in range(2):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        if step:
            with counted(wire):
                optimizer.step()
        else:
            optimizer.step()
    _, _, exchange = optimizer._prepare()
    owned = [0] * dist.get_world_size()
    for owner, matrix in zip(exchange.assignment.owners, exchange.matrices, strict=True):
        owned[owner] += matrix.count
    return wire.exchanged, owned, exchange.bytes_sent


@pytest.mark.parametrize(("count", "world"), [(8, 4), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_experts_that_a_rank_holds_whole_are_its_own_and_nothing_is_sent(count: int, world: int) -> None:
    for sent, owned, planned in run_ranks(work, world, count, 0):
        assert sent == planned == 0
        assert max(owned) == 2 * -(-count // world)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, None], ids=["rows of each", "ddp"])
def test_owners_are_balanced_over_experts(dim: int | None) -> None:
    answers: list[Any] = run_ranks(work, 2, 7, dim)
    for sent, owned, planned in answers:
        assert sent == planned > 0
        assert sorted(owned) == [7, 7]


@pytest.mark.slow
def test_few_experts_on_many_ranks_are_shared_out_all_the_same() -> None:
    for _, owned, _ in run_ranks(work, 4, 2, 0):  # torch gives two ranks one expert of each layer, and two ranks none
        assert owned == [1, 1, 1, 1]
