"""`build_optimizer`: with a plain loop, and under Fabric."""

from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_namo import NAMO, NAMOD, build_optimizer, split_parameters
from tests.helpers.optimizers import all_optimizers
from tests.helpers.rules import taken
from tests.helpers.toy import HYPER, Net, assert_same, batches, train_plainly


@all_optimizers
def test_a_built_optimizer_trains_a_plain_module(cls):
    module = Net()
    optimizer = build_optimizer(module, cls, **taken(cls, HYPER))
    assert type(optimizer) is cls
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "adamw"]
    before = sum(module.loss(batch).item() for batch in batches())
    train_plainly(module, optimizer, epochs=10)
    assert sum(module.loss(batch).item() for batch in batches()) < 0.8 * before


def test_what_is_built_is_what_the_class_makes_of_the_split():
    module, twin = Net(), Net()
    train_plainly(module, build_optimizer(module, NAMOD, clamp=0.3, **HYPER))
    train_plainly(twin, NAMOD(split_parameters(twin), clamp=0.3, **HYPER))
    assert_same(module, twin)


def test_globs_and_blocks_reach_the_routing():
    optimizer = build_optimizer(
        Net(), partial(NAMO, lr=0.5), adamw="head.*", orthogonalize=(), blocks={"backbone.0.weight": 3}
    )
    names = {group["name"]: group["param_names"] for group in optimizer.param_groups}
    assert names["matrices_blocks_3"] == ["backbone.0.weight"]
    assert names["matrices"] == ["backbone.3.weight"]
    assert {"head.weight", "head.bias"} <= set(names["adamw"])
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("key", ["adamw", "orthogonalize"])
def test_a_glob_that_matches_nothing_is_refused(key):
    with pytest.raises(ValueError, match=rf"'\*\.haed\.\*' in {key}.*head"):
        build_optimizer(Net(), NAMO, **{key: "*.haed.*"})


def test_a_module_without_matrices_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Use AdamW: build_optimizer has nothing to orthogonalize"):
        build_optimizer(nn.LayerNorm(4), NAMO)


@pytest.mark.parametrize("module", [[nn.Linear(2, 2)], nn.Linear(2, 2).parameters()])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match="Expected a module"):
        build_optimizer(module, NAMO)


def test_torchs_adamw_refuses_a_checkpoint_of_ours_before_it_loads():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    saved = build_optimizer(module, NAMOD).state_dict()
    adamw = build_optimizer(module, torch.optim.AdamW)
    groups = [dict(group) for group in adamw.param_groups]
    with pytest.raises(ValueError, match="Expected a checkpoint of AdamW, but it is of NAMOD"):
        adamw.load_state_dict(saved)
    assert adamw.param_groups == groups


def test_an_unknown_hyper_parameter_is_refused():
    with pytest.raises(TypeError, match="clamp"):
        build_optimizer(Net(), NAMO, clamp=0.1)


@pytest.mark.parametrize("made", [torch.optim.AdamW, partial(torch.optim.AdamW, foreach=False)])
def test_torchs_adamw_is_built_as_the_baseline(made):
    module, twin = Net(), Net()
    optimizer = build_optimizer(module, made, lr=0.02, weight_decay=0.3)
    assert all({"orthogonalize", "transposed", "blocks"}.isdisjoint(group) for group in optimizer.param_groups)
    train_plainly(module, optimizer)
    train_plainly(twin, torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.3))
    assert_same(module, twin)


def train_with_fabric(fabric: Fabric, module: nn.Module, optimizer: object, epochs: int = 2) -> None:
    for x, y in batches() * epochs:
        optimizer.zero_grad()
        fabric.backward(nn.functional.mse_loss(module(x), y))
        optimizer.step()


@all_optimizers
@pytest.mark.parametrize("together", [True, False])
def test_fabric_trains_as_plain_pytorch_does(cls, together):
    fabric = Fabric(accelerator="cpu", devices=1)
    module, twin = Net(), Net()
    if together:
        wrapped, optimizer = fabric.setup(module, build_optimizer(module, cls, **taken(cls, HYPER)))
    else:
        wrapped = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(build_optimizer(wrapped, cls, **taken(cls, HYPER)))
    train_with_fabric(fabric, wrapped, optimizer)
    assert_same(module, train_plainly(twin, build_optimizer(twin, cls, **taken(cls, HYPER))))


def test_fabric_names_parameters_as_the_module_does():
    module = Fabric(accelerator="cpu", devices=1).setup_module(Net())
    assert build_optimizer(module, NAMO).param_groups[0]["param_names"] == [
        "backbone.0.weight",
        "backbone.3.weight",
    ]


def test_a_closure_under_fabric_trains_as_the_plain_loop_does():
    fabric = Fabric(accelerator="cpu", devices=1)
    module, twin = Net(), Net()
    wrapped, optimizer = fabric.setup(module, build_optimizer(module, NAMO, **HYPER))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(wrapped(x), y)
        fabric.backward(loss)
        return loss

    for x, y in batches():
        expected = nn.functional.mse_loss(wrapped(x), y).item()
        assert optimizer.step(closure).item() == expected
    assert_same(module, train_plainly(twin, build_optimizer(twin, NAMO, **HYPER), epochs=1))


@all_optimizers
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_fabric_checkpoint_goes_on_identically(cls, precision, tmp_path):
    def start() -> tuple[Fabric, nn.Module, object]:
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        module = fabric.setup_module(Net())
        return fabric, module, fabric.setup_optimizers(build_optimizer(module, cls, **taken(cls, HYPER)))

    fabric, whole, whole_optimizer = start()
    train_with_fabric(fabric, whole, whole_optimizer)
    fabric.save(tmp_path / "checkpoint", {"module": whole, "optimizer": whole_optimizer})
    train_with_fabric(fabric, whole, whole_optimizer)

    fabric, resumed, resumed_optimizer = start()
    fabric.load(tmp_path / "checkpoint", {"module": resumed, "optimizer": resumed_optimizer}, weights_only=True)
    train_with_fabric(fabric, resumed, resumed_optimizer)
    assert_same(resumed.module, whole.module)
    assert_same(resumed_optimizer.optimizer, whole_optimizer.optimizer)
