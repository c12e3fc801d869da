"""A parameter that is the module's no longer is noticed, whichever way it was replaced."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_namo import NAMO, build_optimizer, split_parameters


class Layers(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def replace_a_matrix(module: Layers) -> str:
    module.body[1].weight = nn.Parameter(torch.ones(4, 4))
    return "body.1.weight"


def replace_a_bias(module: Layers) -> str:
    module.body[0].bias = nn.Parameter(torch.ones(4))
    return "body.0.bias"


def replace_a_layer(module: Layers) -> str:
    module.head = nn.Linear(4, 4)
    return "head.weight"


def load_by_assignment(module: Layers) -> str:
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    return "body.0.weight"


def materialize(module: Layers) -> str:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    return "body.0.weight"


REPLACEMENTS = [replace_a_matrix, replace_a_bias, replace_a_layer, load_by_assignment, materialize]


def train(module: Layers, optimizer: torch.optim.Optimizer, zero: Callable[[], Any], steps: int) -> None:
    for _ in range(steps):
        zero()
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
def test_a_replaced_parameter_is_noticed_in_the_next_step(replace: Callable[[Layers], str]) -> None:
    module = Layers()
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 2)
    name = replace(module)
    with pytest.raises(RuntimeError, match=rf"but {name} of Layers no longer is: the module was sharded or replaced"):
        train(module, optimizer, optimizer.zero_grad, 1)


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
def test_a_replaced_parameter_that_keeps_its_last_gradient_is_noticed_within_a_step_for_each_parameter(
    replace: Callable[[Layers], str],
) -> None:
    module = Layers()
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 2)
    replace(module)
    with pytest.raises(RuntimeError, match="of Layers no longer is"):
        train(module, optimizer, module.zero_grad, sum(1 for _ in module.parameters()))


def test_what_only_changes_names_or_uses_is_no_replacement() -> None:
    module = Layers()
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 1)
    prune.identity(module.head, "weight")  # the same parameter by another name
    module.body[0].requires_grad_(False)
    train(module, optimizer, optimizer.zero_grad, 8)
    module.body[1] = nn.Sequential(module.body[1])
    train(module, optimizer, optimizer.zero_grad, 8)


def test_a_layer_that_is_gone_is_warned_of_once_and_the_others_train_on() -> None:
    module = Layers()
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 2)
    del module.head
    module.forward = lambda x: module.body(x)
    with pytest.warns(UserWarning, match=r"head\.weight of Layers is gone from the module"):
        train(module, optimizer, optimizer.zero_grad, 1)
    before = module.body[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, optimizer.zero_grad, 8)
    assert not torch.equal(before, module.body[0].weight)


def test_a_scripted_layer_trains() -> None:
    module = Layers()
    module.head = torch.jit.script(module.head)
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 8)


def calls_of_the_check(layers: int) -> int:
    """Python calls within the check of one step, of every function that it calls."""
    module = Layers(layers)
    optimizer = build_optimizer(module, NAMO)
    train(module, optimizer, optimizer.zero_grad, 1)
    checked = optimizer._trained.check
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        checked(set())
    finally:
        sys.setprofile(None)
    return count


def test_the_check_of_a_step_does_not_grow_with_the_model() -> None:
    few, many = calls_of_the_check(2), calls_of_the_check(40)
    assert 0 < few == many


def run_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.step()


def test_a_parameter_unfrozen_behind_the_optimizers_back_is_warned_of_once() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[0].requires_grad_(False)
    optimizer = NAMO(split_parameters(module, heads="matrix"))
    module.requires_grad_(True)
    for _ in range(2):
        module(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"0\.weight of Sequential has a gradient but is in no group of NAMO") as found:
        run_steps(optimizer, 2)
    assert len(found) == 1
