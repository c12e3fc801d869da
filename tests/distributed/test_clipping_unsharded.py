"""Clipping after a forward pass outside training, which leaves FSDP2's root with whole parameters registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_namo import NAMO, GradientClipping, clip_gradients, gradient_norm, optimize_with
from tests.helpers import toy
from tests.helpers.launch import run_ranks

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def sharded() -> nn.Module:
    """Only its root is a unit: it is whole after a forward pass, with all of its parameters."""
    module = fully_shard(network())
    module(X).square().sum().backward()
    return module


def look(module: nn.Module) -> None:
    """A forward pass outside training, as for a log or a sample."""
    with torch.no_grad():
        module(X)
    assert not any(isinstance(p, DTensor) for p in module.parameters()), "else this test shows nothing"


def given(module: nn.Module) -> dict[str, Any]:
    return {"parameters": list(module.parameters())}


def as_generator(module: nn.Module) -> dict[str, Any]:
    return {"parameters": module.parameters()}


def by_default(module: nn.Module) -> dict[str, Any]:
    return {}


WAYS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "by default": by_default,
    "given": given,
    "as a generator": as_generator,
}


def clip_after_a_look(way: str) -> dict[str, Any]:
    module, looked = sharded(), sharded()
    optimizer_s = list(looked.parameters())
    clip_gradients(module, max_norm=0.5)
    look(looked)
    measured = gradient_norm(looked, **WAYS[way](looked)).item()
    look(looked)
    norm = clip_gradients(looked, max_norm=0.5, **WAYS[way](looked)).item()
    pairs = zip(module.parameters(), optimizer_s, strict=True)
    same = all(torch.equal(p.grad.to_local(), q.grad.to_local()) for p, q in pairs)
    return {"measured": measured, "norm": norm, "clipped alike": same}


def clip_stale() -> str:
    """Parameters that were collected while they were whole, after FSDP2 has sharded them again."""
    module = sharded()
    look(module)
    stale = list(module.parameters())
    module(X).square().sum().backward()
    try:
        clip_gradients(module, max_norm=0.5, parameters=stale)
    except ValueError as error:
        return str(error)
    return "no error"


class Looking(pl.LightningModule):
    """Runs a forward pass without gradients between the backward pass and the clipping."""

    def __init__(self, look: bool) -> None:
        super().__init__()
        self.look = look
        self.norms: list[float] = []

    configure_optimizers = optimize_with(NAMO, orthogonalizer="svd")

    def configure_model(self) -> None:
        self.net = network()
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_after_backward(self) -> None:
        if self.look:
            look(self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        self.norms.append(self.trainer.callback_metrics["grad_norm"].item())


def fit(look: bool) -> list[float]:
    module = Looking(look)
    trainer = toy.trainer(GradientClipping(max_norm=0.1), devices=2, strategy=ModelParallelStrategy(), max_steps=1)
    trainer.fit(module, DataLoader(list(X.double().float()), batch_size=2))
    return module.norms


def work(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {way: clip_after_a_look(way) for way in WAYS}
    answers["stale"] = clip_stale()
    answers["callback"] = fit(look=False), fit(look=True)
    return answers


def test_a_forward_pass_outside_training_changes_nothing_in_the_clipping() -> None:
    plain = network()
    plain(X).square().sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    for answer in run_ranks(work, 2):
        for way in WAYS:
            found = answer[way]
            assert abs(found["measured"] / norm - 1) < 1e-6, way
            assert abs(found["norm"] / norm - 1) < 1e-6, way
            assert found["clipped alike"], way
        assert "Expected parameters of the module" in answer["stale"]
        assert "leave out parameters=" in answer["stale"]
        before, after = answer["callback"]
        assert before == after
        assert len(before) == 1
        assert before[0] > 0.1
