"""Optimizers of every kind of group, their gradients and their state, for the tests of optim."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from tests.helpers.rules import BUILT_IN, RULES, taken
from tests.helpers.toy import assert_same
from tests.helpers.two_rounds import TwoRounds

OPTIMIZERS = [cls for cls in RULES.values() if cls is not TwoRounds]  # whose momentum is none of gradients
EXACT = {"orthogonalizer": "svd"}
all_optimizers = pytest.mark.parametrize("cls", OPTIMIZERS)
built_in_optimizers = pytest.mark.parametrize("cls", BUILT_IN)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=seed, dtype=dtype))


def build(cls: type, dtype: torch.dtype = torch.float32, **hyper: object) -> OrthogonalizedOptimizer:
    """Two groups of matrices, one of them fused, and two of AdamW."""
    return cls(
        [
            {"params": [parameter(6, 4, seed=1, dtype=dtype), parameter(3, 5, seed=2, dtype=dtype)]},
            {"params": [parameter(6, 5, seed=3, dtype=dtype)], "blocks": [2, 4], "name": "fused"},
            {"params": [parameter(5, seed=4, dtype=dtype)], "orthogonalize": False, "name": "biases"},
            {"params": [parameter(7, 3, seed=5, dtype=dtype)], "orthogonalize": False, "eps": 1e-6},
        ],
        **taken(cls, hyper),
    )


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for index, p in enumerate(parameters(optimizer)):
        p.grad = randn(*p.shape, seed=100 * seed + index).to(p)


def run(optimizer: torch.optim.Optimizer, *seeds: int) -> torch.optim.Optimizer:
    for seed in seeds:
        set_gradients(optimizer, seed)
        optimizer.step()
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """A parameter and its state, copied; the counter of skipped steps left out."""
    return copy.deepcopy({"weight": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k != "skipped"}})


def assert_same_run(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Equal weights and state, bit by bit."""
    assert_same([p.detach() for p in parameters(actual)], [p.detach() for p in parameters(expected)])
    assert_same(actual, expected)


def through_a_file(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def exact_run(cls: type, groups: list[dict], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Weights after some steps with the exact polar factor in float64; gradients by step and parameter."""
    optimizer = cls(groups, lr=0.1, **EXACT)
    for step in gradients:
        for p, grad in zip(parameters(optimizer), step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in parameters(optimizer)]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.qkv = nn.Linear(4, 12)
        self.up = nn.ConvTranspose1d(4, 6, 3)


def refused(match: str) -> pytest.RaisesExc:
    return pytest.raises(ValueError, match=match)


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
]
