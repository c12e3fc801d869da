"""Checkpoints beside the Trainer's: torch.distributed.checkpoint and Fabric; and those that a strategy cannot read."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from lightning_namo import NAMO, NAMOD, Muon, build_optimizer
from lightning_namo.testing.layouts import shard_children, whole
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.resuming import run_cases
from tests.helpers.rules import RULES
from tests.helpers.strategies import fsdp2
from tests.helpers.worker import relative_error

OPTIMIZERS = {**RULES, "post": partial(Muon, order="post"), "NAMO post": partial(NAMO, order="post")}


class UnevenNet(nn.Module):
    """One layer never has a gradient; one has a single row, which leaves ranks without any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.unused = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(4, 4)
        self.down = nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def train(model: nn.Module, optimizer: Any, steps: range, backward: Any = Tensor.backward) -> None:
    for seed in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        backward(model(x).square().sum())
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def sharded(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shard_children(UnevenNet(), init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, build_optimizer(model, OPTIMIZERS[optimizer], lr=0.02, orthogonalizer="svd")


def options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def save_with_dcp(rank: int, folder: str) -> dict[Any, dict[str, Tensor]]:
    answers = {}
    for optimizer in OPTIMIZERS:
        for flat in (False, True):
            for saved_at in (0, 3):  # 0: before the first step
                model, ours = sharded(optimizer)
                train(model, ours, range(saved_at))
                state = dict(
                    zip(("model", "optimizer"), get_state_dict(model, ours, options=options(flat)), strict=True)
                )
                dcp.save(state, checkpoint_id=str(Path(folder, f"{optimizer}-{flat}-{saved_at}")))
                train(model, ours, range(saved_at, 6))
                answers[optimizer, flat, saved_at] = weights(model)
    return answers


def load_with_dcp(rank: int, folder: str) -> dict[Any, dict[str, Tensor]]:
    answers = {}
    for optimizer in OPTIMIZERS:
        for flat in (False, True):
            for saved_at in (0, 3):
                model, ours = sharded(optimizer)
                model_state, optimizer_state = get_state_dict(model, ours, options=options(flat))
                state = {"model": model_state, "optimizer": optimizer_state}
                dcp.load(state, checkpoint_id=str(Path(folder, f"{optimizer}-{flat}-{saved_at}")))
                set_state_dict(
                    model,
                    ours,
                    model_state_dict=state["model"],
                    optim_state_dict=state["optimizer"],
                    options=options(flat),
                )
                train(model, ours, range(saved_at, 6))
                answers[optimizer, flat, saved_at] = weights(model)
    return answers


def test_torch_distributed_checkpoint_moves_between_numbers_of_ranks(tmp_path: Path) -> None:
    expected = run_ranks(save_with_dcp, 2, str(tmp_path), timeout=120)[0]
    for world in (3, 1):
        actual = run_ranks(load_with_dcp, world, str(tmp_path), timeout=120)[0]
        for case, trained in expected.items():
            for name, weight in trained.items():
                assert relative_error(actual[case][name], weight) <= 1e-12, (world, case, name)


def run_fabric(strategy: str, folder: str, resume: str | None) -> dict[str, Tensor]:
    chosen = ModelParallelStrategy(parallelize_fn=fsdp2) if strategy == "fsdp2" else strategy
    fabric = Fabric(accelerator="cpu", devices=1 if strategy == "auto" else 2, strategy=chosen)
    fabric.launch()
    net = UnevenNet()
    net.unused.requires_grad_(False)  # DDP would wait for its gradients
    model = fabric.setup_module(net)
    optimizer: Any = fabric.setup_optimizers(build_optimizer(model, NAMOD, lr=0.02, orthogonalizer="svd"))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    if resume is not None:
        fabric.load(Path(folder, resume), state)
    else:
        train(model, optimizer, range(3), fabric.backward)
        fabric.save(Path(folder, strategy), state | {"step": 3})
    train(model, optimizer, range(3, 6), fabric.backward)
    return weights(net)


FABRIC = [("ddp", None), ("fsdp2", None), ("fsdp2", "ddp"), ("fsdp2", "auto"), ("fsdp2", "fsdp2"), ("ddp", "auto")]


def run_fabric_cases(rank: int, folder: str) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    return {(to, resume): run_fabric(to, folder, resume) for to, resume in FABRIC}


def test_fabric_goes_on_under_another_strategy(tmp_path: Path) -> None:
    answers = {("auto", None): run_fabric("auto", str(tmp_path), None)}
    answers |= run_ranks(run_fabric_cases, 2, str(tmp_path), timeout=120)[0]
    answers["auto", "ddp"] = run_fabric("auto", str(tmp_path), "ddp")
    for (to, resume), trained in answers.items():
        for name, weight in trained.items():
            assert relative_error(weight, answers["auto", None][name]) <= 1e-12, (to, resume, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sharded"))
    run_ranks(run_cases, 2, [("fsdp2 2 sharded", "NAMO", None), ("fsdp1 2 sharded", "NAMO", None)], folder, timeout=90)
    return folder


@pytest.mark.parametrize(
    ("source", "to", "message"),
    [
        ("fsdp2 2 sharded", "single", "Is a directory"),
        ("fsdp2 2 sharded", "fsdp1 2", "Missing key in checkpoint state_dict"),
        ("fsdp1 2 sharded", "fsdp2 2", "Missing key in checkpoint state_dict"),
    ],
)
def test_a_sharded_checkpoint_of_another_strategy_ends_the_run(source: str, to: str, message: str, folder: str) -> None:
    if to == "single":
        with pytest.raises(IsADirectoryError, match=message):
            run_cases(0, [(to, "NAMO", source)], folder)
    else:
        with pytest.raises(WorkerError, match=message):
            run_ranks(run_cases, 2, [(to, "NAMO", source)], folder, timeout=90)
