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
from lightning_namo.sharding.local import local_tensor
from lightning_namo.testing.layouts import Experts
from tests.helpers.launch import WorkerError, run_ranks
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


def other_number_of_experts(rank: int) -> None:
    module = Experts(4 + 4 * rank, 6, 5)
    torch.nn.init.ones_(module.weight)  # equal weights: the number alone tells
    optimizer = build_optimizer(module, NAMO)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()


def test_another_number_of_experts_on_one_rank_is_refused_on_all() -> None:
    with pytest.raises(
        WorkerError, match=r"rank 0 has weight of Experts \(4, 6, 5\).*where rank 1 has.*\(8, 6, 5\)"
    ) as e:
        run_ranks(other_number_of_experts, 2, timeout=60)
    assert str(e.value).count("ValueError: Expected the same parameters on all ranks") == 2


def spoiled_expert(rank: int, dim: int | None, bad: float | str | None) -> list[tuple[bool, float, float]]:
    """Of two layers, the first of which has a spoiled expert: whether the weight was moved, its steps and skips."""
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(Experts(4, 6, 4), Experts(4, 4, 6))
    if dim is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        module = fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(dim))
    optimizer = build_optimizer(module, NAMO)
    before = [local_tensor(p).clone() for p in module.parameters()]
    for number, p in enumerate(module.parameters()):
        p.grad = torch.ones_like(p)
        if number == 0 and isinstance(bad, float) and (rank == 1 or dim is None):
            local_tensor(p.grad)[-1, 0, 0] = bad
        elif number == 0 and (bad == "nowhere" or (bad is None and rank == 1)):
            p.grad = None
    optimizer.step()
    return [
        (not torch.equal(local_tensor(p), old), optimizer.state[p]["step"].item(), optimizer.state[p]["skipped"].item())
        for p, old in zip(module.parameters(), before, strict=True)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "nowhere"])
@pytest.mark.parametrize("dim", [0, 1, None], ids=["experts", "rows of each", "ddp"])
def test_an_expert_with_a_gradient_that_is_not_finite_skips_the_parameter_on_all_ranks(
    dim: int | None, bad: float | str | None
) -> None:
    for answer in run_ranks(spoiled_expert, 2, dim, bad):
        assert answer == [(False, 0, bad != "nowhere"), (True, 1, 0)]
