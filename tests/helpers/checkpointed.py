"""A model whose optimizers' state dicts are saved, refused and taken over."""

from typing import Any

import torch
from torch import nn

from lightning_namo import build_optimizer
from tests.helpers.optimizers import EXACT, OPTIMIZERS
from tests.helpers.toy import assert_same


class Model(nn.Module):
    """Matrices and others take turns; one matrix is fused of three, one is stored transposed, one is frozen."""

    def __init__(self, rows: int = 4, columns: int = 5, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, columns)
        self.qkv = nn.Linear(columns, 3 * rows)
        self.frozen = nn.Linear(rows, 2).requires_grad_(not frozen)
        self.norm = nn.LayerNorm(3 * rows)
        self.conv = nn.ConvTranspose1d(rows, columns, 2)
        self.out = nn.Linear(rows, columns)


def build_exact(model: nn.Module, cls: Any, **options: Any) -> torch.optim.Optimizer:
    exact = EXACT if cls in OPTIMIZERS else {}
    routing = {"blocks": {"qkv.weight": 3}, "heads": "matrix", "first_layers": "matrix"}
    return build_optimizer(model, cls, **routing, **{"lr": 0.01, **exact, **options})


def step(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int, missing: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in missing or not parameter.requires_grad else grad.to(parameter.dtype)
    optimizer.step()


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert_same(actual["state"], expected["state"])


def other_model() -> nn.Module:
    model = Model()
    model.head = nn.Linear(4, 4)
    return model


def trained(cls: Any, model: nn.Module, steps: int = 5, **options: Any) -> torch.optim.Optimizer:
    optimizer = build_exact(model, cls, **options)
    for seed in range(steps):
        step(optimizer, model, seed)
    return optimizer


class Chain(nn.Module):
    """Layers of one shape, in the order of the names."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(3, 3))
