"""Names of parameters: wrappers leave no trace in them."""

from collections.abc import Callable

import pytest
import torch
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, groups_of


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        checkpoint_wrapper,
        lambda module: _FabricModule(module, strategy=None),
        lambda module: _FabricModule(nn.DataParallel(torch.compile(module)), None, original_module=module),
    ],
    ids=["compile", "data_parallel", "checkpoint", "fabric", "fabric_data_parallel_compile"],
)
def test_wrappers_leave_no_trace(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = GPT("untied")
    expected = split_parameters(plain).routes
    assert split_parameters(wrap(plain)).routes == expected


def test_a_child_of_the_users_own_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    assert list(groups_of(split_parameters(model))) == ["module.weight", "module.bias"]
