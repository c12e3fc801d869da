"""What is not the way to an optimizer is refused, and the message names the ways: by hand, by YAML, DeepSpeed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy as FabricDeepSpeedStrategy
from lightning.fabric.strategies import SingleDeviceStrategy as FabricSingleDeviceStrategy
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lightning_namo import NAMO, OptimizerCallback, build_optimizer, clip_gradients, optimize_with
from tests.helpers.optimizers import all_optimizers
from tests.helpers.toy import Net, fit, trainer

CPU = torch.device("cpu")


def ways(cls: type) -> str:
    """What a message must name, in this order."""
    name = cls.__name__
    return rf"(?s)build_optimizer\(module, {name}\).*optimize_with\({name}\).*OptimizerCallback"


# --- a module, or its parameters --------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), Net()], ids=type)
def test_a_module_is_refused_and_the_ways_are_named(cls, module):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}: .*got a module, {type(module).__name__}") as error:
        cls(module)
    assert re.search(ways(cls), str(error.value))


@all_optimizers
@pytest.mark.parametrize("given", [nn.Module.parameters, nn.Module.named_parameters, lambda m: list(m.parameters())])
def test_all_parameters_of_a_module_are_refused_and_the_ways_are_named(cls, given):
    with pytest.raises(ValueError, match=ways(cls)):
        cls(given(Net()))


def test_lightnings_own_option_of_the_command_line_names_the_ways(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["accelerator=cpu", "max_steps=1", "logger=false", "enable_checkpointing=false", "barebones=true"]
    args = ["fit", "--optimizer=lightning_namo.NAMO", *(f"--trainer.{option}" for option in options)]
    with pytest.raises(ValueError, match=ways(NAMO)) as error:
        LightningCLI(Net, args=args, save_config_callback=None, seed_everything_default=False)
    assert "LightningCLI's --optimizer" in str(error.value)


# --- DeepSpeed: it is not installed here, so stand-ins for its strategies ---------------------------


class StandIn(SingleDeviceStrategy):
    """Trains on one device, and passes for DeepSpeedStrategy."""

    @property
    def __class__(self) -> type:
        return DeepSpeedStrategy


class FabricStandIn(FabricSingleDeviceStrategy):
    """Trains on one device, and passes for Fabric's DeepSpeedStrategy."""

    @property
    def __class__(self) -> type:
        return FabricDeepSpeedStrategy


class OneLine(Net):
    configure_optimizers = optimize_with(NAMO)


class ByHand(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, NAMO)


REFUSAL = r"DeepSpeed.*FSDPStrategy.*ModelParallelStrategy"


@pytest.mark.parametrize("module", [OneLine, ByHand])
def test_deepspeed_is_refused_where_the_optimizer_is_configured(module):
    with pytest.raises(ValueError, match=REFUSAL):
        fit(module(), strategy=StandIn(CPU))


def test_deepspeed_is_refused_by_the_callback_before_anything_is_set_up():
    class Watched(Net):
        configured = False

        def configure_model(self) -> None:
            type(self).configured = True

    module = Watched()
    with pytest.raises(ValueError, match=REFUSAL):
        fit(module, OptimizerCallback(), strategy=StandIn(CPU))
    assert not Watched.configured
    assert "configure_optimizers" not in vars(module)


def test_deepspeed_is_no_matter_where_nothing_is_trained():
    callback, module = OptimizerCallback(), Net()
    validating = trainer(callback, strategy=StandIn(CPU))
    module.trainer = validating
    callback.setup(validating, module, "validate")
    with pytest.raises(ValueError, match=REFUSAL):
        callback.setup(validating, module, "fit")


def test_deepspeed_is_refused_with_fabric():
    fabric = Fabric(strategy=FabricStandIn(CPU))
    module = fabric.setup_module(Net())
    with pytest.raises(ValueError, match=REFUSAL):
        build_optimizer(module, NAMO)


# --- modules whose parameters share names -----------------------------------------------------------


class Generator(nn.Sequential):
    pass


class Critic(nn.Sequential):
    pass


def layers() -> list[nn.Module]:
    return [nn.Linear(4, 4), nn.Embedding(5, 4, sparse=True)]


def wrappings() -> dict[str, Any]:
    return {
        "plain": lambda module: module,
        "compiled": torch.compile,
        "data parallel": nn.DataParallel,
        "fabric": lambda module: Fabric(accelerator="cpu").setup_module(module),
    }


@pytest.mark.parametrize("wrapping", wrappings())
@pytest.mark.parametrize("kind", [Generator, Critic])
def test_a_refusal_names_the_class_of_the_parameters_module(kind, wrapping):
    module = wrappings()[wrapping](kind(*layers()))
    optimizer = build_optimizer(module, NAMO)
    with pytest.raises(ValueError, match=rf"blocks of 0\.weight of {kind.__name__} \(4, 4\)"):
        optimizer.add_param_group({"params": [("0.weight", nn.Parameter(torch.ones(4, 4)))], "blocks": 3})


@pytest.mark.parametrize("kind", [Generator, Critic])
def test_clipping_names_the_class_of_the_parameters_module(kind):
    module = kind(*layers())
    module[1](torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=rf"1\.weight of {kind.__name__} has a torch\.sparse_coo"):
        clip_gradients(module, max_norm=1.0)


def test_a_warning_names_the_class_of_the_parameters_module():
    module = Critic(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    optimizer = build_optimizer(module, NAMO)
    module[1].requires_grad_(True)
    module(torch.ones(1, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"1\.(weight|bias) of Critic has a gradient"):
        optimizer.step()
