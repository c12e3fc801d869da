"""The estimate of a step on many ranks equals what real ranks plan, hold and send; and what the command line says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_namo import NAMO, build_optimizer
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.parallel import shard
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.planning.cost_model import Estimate, estimate
from lightning_namo.planning.models import build_model
from lightning_namo.planning.simulated_mesh import SimulatedMesh
from lightning_namo.sharding.local import local_tensor
from lightning_namo.testing.layouts import LAYOUTS, new_module
from tests.helpers.launch import run_ranks
from tests.helpers.rules import RULES
from tests.helpers.worker import Wire, counted

PLAIN = [(layout, "NAMO") for layout in ("ddp", "fsdp2-even", "fsdp2-uneven", "hsdp", "fsdp2+tp")]
PLAIN += [("fsdp2-uneven", "NAMOD"), ("fsdp2+tp", "AdaMuon")]  # other statistics and state
SHARDED = {2: ((2, 1), (1, 2)), 3: ((3, 1),), 4: ((2, 1), (1, 2), (2, 2))}  # replicas and tensor ranks of a GPT-2
WORLD_SIZES = [pytest.param(size, marks=[pytest.mark.slow] * (size > 2)) for size in SHARDED]
DIVIDED = {"*.tall.*": 0, "*.fused.*": 0, "*.wide.layer.weight": 1, "*.few.layer.weight": 1}
DIVIDED |= {"*.experts.layer.weight": 0, "*.turned.layer.weight": 2}


def gpt2() -> GPT2:
    """A GPT-2 whose 10 and 30 rows divide unevenly, the same on all ranks."""
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=33, block_size=8, n_layer=2, n_head=2, n_embd=10, bias=True))


def optimizer_of(module: nn.Module, algorithm: str, blocks: Any = None) -> OrthogonalizedOptimizer:
    optimizer = build_optimizer(module, RULES[algorithm], blocks=blocks)
    optimizer.bucket_bytes = 1500
    return optimizer


def facts_of(module: nn.Module, algorithm: str, blocks: Any) -> dict[str, Any]:
    """What one real rank plans, sends and holds."""
    optimizer = optimizer_of(module, algorithm, blocks)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the plan
    wire = Wire()
    with counted(wire):
        optimizer.step()
    exchange = optimizer._prepare()[2]
    state = [local_tensor(value) for held in optimizer.state.values() for value in held.values()]
    return {
        "assignment": exchange.assignment,
        "bytes_sent": exchange.bytes_sent,
        "wire": wire,
        "parameters": sum(local_tensor(p).nbytes for p in module.parameters()),
        "state": sum(value.nbytes for value in state),
    }


def real_ranks(rank: int, sharded: tuple[tuple[int, int], ...]) -> dict[Any, Any]:
    facts: dict[Any, Any] = {}
    for layout, algorithm in PLAIN:
        kind, wrap = LAYOUTS[layout]
        facts[layout, algorithm] = facts_of(wrap(new_module(kind, torch.float32)), algorithm, kind.blocks)
    world_size = torch.distributed.get_world_size()
    for replicas, tensor in sharded:
        module = gpt2()
        mesh = init_device_mesh(
            "cpu", (world_size // tensor, tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        shard(module, mesh, replicas=replicas)
        facts[replicas, tensor] = facts_of(module, "NAMO", None)
    return facts


@functools.cache
def real(world_size: int) -> list[dict[Any, Any]]:
    return run_ranks(real_ranks, world_size, SHARDED[world_size], timeout=200)


def grid_of(layout: str, ranks: int) -> SimulatedMesh:
    two = 2 if ranks % 2 == 0 else 1  # as in lightning_namo.testing.layouts
    sizes = {"ddp": (ranks, 1, 1), "hsdp": (ranks // two, two, 1), "fsdp2+tp": (1, ranks // two, two)}
    return SimulatedMesh(*sizes.get(layout, (1, ranks, 1)))


def check(result: Estimate, ranks: list[dict[str, Any]]) -> None:
    for rank, facts in zip(result.ranks, ranks, strict=True):
        assert facts["assignment"] == result.assignment
        assert facts["bytes_sent"] == facts["wire"].exchanged == rank.sent
        assert facts["wire"].summed == result.reduced
        assert facts["wire"].calls.count("all_to_all") == result.all_to_alls
        assert facts["wire"].calls.count("all_reduce") == result.all_reduces
        assert (facts["parameters"], facts["state"]) == (rank.parameters, rank.state)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("layout", "algorithm"), PLAIN)
def test_plan_bytes_and_state_are_those_of_real_ranks(layout: str, algorithm: str, world_size: int) -> None:
    kind, _ = LAYOUTS[layout]
    with torch.device("meta"):
        optimizer = optimizer_of(kind(), algorithm, kind.blocks)
    result = estimate(optimizer, grid_of(layout, world_size), divided=DIVIDED)
    check(result, [facts[layout, algorithm] for facts in real(world_size)])


@pytest.mark.parametrize(
    ("world_size", "replicas", "tensor"),
    [
        pytest.param(world_size, *sizes, marks=[pytest.mark.slow] * (world_size > 2))
        for world_size, cases in SHARDED.items()
        for sizes in cases
    ],
)
def test_a_sharded_gpt2_is_as_estimated(world_size: int, replicas: int, tensor: int) -> None:
    with torch.device("meta"):
        optimizer = optimizer_of(gpt2(), "NAMO")
    result = estimate(optimizer, SimulatedMesh(replicas, world_size // replicas // tensor, tensor))
    check(result, [facts[replicas, tensor] for facts in real(world_size)])


def test_nothing_of_70_billion_parameters_takes_memory_and_1024_ranks_are_planned_in_seconds() -> None:
    module = build_model("llama_70b").module
    optimizer = build_optimizer(module, NAMO)
    result = estimate(optimizer, SimulatedMesh.of("fsdp2", 1024), tokens_per_step=4 * 2**20)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert all(value.is_meta for state in optimizer.state.values() for value in state.values())
    assert result.elements == 68_976_648_192  # of the published model
    assert len(result.matrices) == 560
    assert result.busiest == result.bound
    assert sum(rank.sent for rank in result.ranks) == sum(rank.received for rank in result.ranks)
    assert sum(rank.sent for rank in result.ranks) <= 1024 * result.formula
