"""build_optimizer and optimize_with: plain PyTorch, Fabric, and real runs of the Trainer."""

import copy
import logging
from functools import partial

import lightning_utilities.core.rank_zero as rank_zero_module
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_namo import (
    NAMO,
    NAMOD,
    AdaMuon,
    Muon,
    WarmupStableDecay,
    build_optimizer,
    optimize_with,
    split_parameters,
)
from tests.helpers.toy import BATCHES, Net, Resumable, assert_same, batches, checkpoints, fit, trainer

OPTIMIZERS = [NAMO, NAMOD, Muon, AdaMuon]
HYPER = {"lr": 0.02, "adamw_lr": 0.005, "weight_decay": 0.2}

all_optimizers = pytest.mark.parametrize("cls", OPTIMIZERS)


def train_plainly(module: Net, optimizer: torch.optim.Optimizer, epochs: int = 2) -> Net:
    for batch in batches() * epochs:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    return module


def net_with(configure: object) -> Net:
    return type("Configured", (Net,), {"configure_optimizers": configure})()


# --- build_optimizer ------------------------------------------------------------------------------


@all_optimizers
def test_a_built_optimizer_trains_a_plain_module(cls):
    module = Net()
    optimizer = build_optimizer(module, cls, **HYPER)
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
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        build_optimizer(nn.LayerNorm(4), NAMO)


@pytest.mark.parametrize("module", [[nn.Linear(2, 2)], nn.Linear(2, 2).parameters()])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match="Expected a module"):
        build_optimizer(module, NAMO)


@pytest.mark.parametrize("make", [optimize_with, lambda cls: build_optimizer(nn.Linear(2, 2), cls)])
def test_what_is_no_class_is_refused_at_once(make):
    with pytest.raises(TypeError, match="expected an optimizer class, as NAMOD, but got 'NAMOD'"):
        make("NAMOD")


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


@pytest.mark.parametrize("when", ["before the first step", "after some steps"])
def test_an_optimizer_whose_parameters_are_no_longer_the_modules_raises(when):
    module = Net()
    optimizer = build_optimizer(module, NAMO)
    if when == "after some steps":
        train_plainly(module, optimizer, epochs=1)
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 2)))]})
    else:
        module.head = nn.Linear(10, 3)
    with pytest.raises(RuntimeError, match=r"to be the module's.*Shard first.*build_optimizer"):
        train_plainly(module, optimizer, epochs=1)


@pytest.mark.parametrize("made", [torch.optim.AdamW, partial(torch.optim.AdamW, foreach=False)])
def test_torchs_adamw_is_built_as_the_baseline(made):
    module, twin = Net(), Net()
    optimizer = build_optimizer(module, made, lr=0.02, weight_decay=0.3)
    assert all({"orthogonalize", "transposed", "blocks"}.isdisjoint(group) for group in optimizer.param_groups)
    train_plainly(module, optimizer)
    train_plainly(twin, torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.3))
    assert_same(module, twin)


# --- Fabric ---------------------------------------------------------------------------------------


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
        wrapped, optimizer = fabric.setup(module, build_optimizer(module, cls, **HYPER))
    else:
        wrapped = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(build_optimizer(wrapped, cls, **HYPER))
    train_with_fabric(fabric, wrapped, optimizer)
    assert_same(module, train_plainly(twin, build_optimizer(twin, cls, **HYPER)))


def test_fabric_names_parameters_as_the_module_does():
    module = Fabric(accelerator="cpu", devices=1).setup_module(Net())
    assert build_optimizer(module, NAMO).param_groups[0]["param_names"] == [
        "backbone.0.weight",
        "backbone.3.weight",
        "head.weight",
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
        return fabric, module, fabric.setup_optimizers(build_optimizer(module, cls, **HYPER))

    fabric, whole, whole_optimizer = start()
    train_with_fabric(fabric, whole, whole_optimizer)
    fabric.save(tmp_path / "checkpoint", {"module": whole, "optimizer": whole_optimizer})
    train_with_fabric(fabric, whole, whole_optimizer)

    fabric, resumed, resumed_optimizer = start()
    fabric.load(tmp_path / "checkpoint", {"module": resumed, "optimizer": resumed_optimizer}, weights_only=True)
    train_with_fabric(fabric, resumed, resumed_optimizer)
    assert_same(resumed.module, whole.module)
    assert_same(resumed_optimizer.optimizer, whole_optimizer.optimizer)


# --- optimize_with --------------------------------------------------------------------------------


@all_optimizers
def test_the_one_line_trains_as_the_plain_loop_does(cls):
    module, twin = net_with(optimize_with(cls, **HYPER)), Net()
    fit(module)
    assert_same(module, train_plainly(twin, build_optimizer(twin, cls, **HYPER)))


def test_it_can_be_called_inside_the_hook():
    def configure_optimizers(self: Net) -> object:
        return optimize_with(NAMO, adamw="head.weight", schedule=WarmupStableDecay(warmup=3), **HYPER)(self)

    inside = net_with(configure_optimizers)
    above = net_with(optimize_with(NAMO, adamw="head.weight", schedule=WarmupStableDecay(warmup=3), **HYPER))
    fit(inside)
    fit(above)
    assert_same(inside, above)


def test_instances_of_one_class_have_optimizers_of_their_own():
    class Configured(Net):
        configure_optimizers = optimize_with(NAMO, **HYPER)

    first, second, alone = Configured(), Configured(), Configured()
    fit(first, max_epochs=1)
    fit(second)
    fit(alone)
    assert_same(second, alone)


def test_any_scheduler_can_be_the_schedule():
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)
    trained = fit(net_with(optimize_with(NAMO, schedule=halving, lr=0.08, adamw_lr=0.008)))
    assert trained.global_step == 2 * BATCHES
    assert [group["lr"] for group in trained.optimizers[0].param_groups] == pytest.approx([0.01, 0.001])


def test_torchs_adamw_trains_as_configured_by_hand():
    module, twin = net_with(optimize_with(torch.optim.AdamW, lr=0.02)), Net()
    fit(module)
    assert_same(module, train_plainly(twin, torch.optim.AdamW(twin.parameters(), lr=0.02)))


@pytest.fixture
def messages():
    """What rank_zero_info says."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    rank_zero_module.log.addHandler(handler)
    yield found
    rank_zero_module.log.removeHandler(handler)


def test_the_routing_table_is_logged_once(messages):
    fit(net_with(optimize_with(NAMO, adamw="head.weight")))
    (table,) = [message for message in messages if "backbone" in message]
    assert table.startswith("NAMO trains the parameters of Configured so:")
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert set(rows) >= {name for name, _ in Net().named_parameters()}
    assert "matrices" in rows["backbone.0.weight"]
    assert "glob 'head.weight' in adamw" in rows["head.weight"]


def test_the_routing_table_is_logged_on_rank_zero_only(messages, monkeypatch):
    module = net_with(optimize_with(NAMO))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    module.configure_optimizers()
    assert messages == []


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "precision"), [*((cls, "32-true") for cls in OPTIMIZERS), (NAMO, "bf16-true"), (NAMOD, "bf16-mixed")]
)
@pytest.mark.parametrize("step", [4, BATCHES])
def test_a_resumed_run_equals_the_uninterrupted_one(cls, precision, step, tmp_path):
    class Configured(Net):
        configure_optimizers = optimize_with(cls, schedule=WarmupStableDecay(warmup=3, decay=0.5), **HYPER)

        def train_dataloader(self) -> Resumable:
            return Resumable()

    whole, resumed = Configured(), Configured()
    saving = checkpoints(tmp_path, every_n_train_steps=step)
    uninterrupted = fit(whole, saving, max_epochs=3, precision=precision, enable_checkpointing=True)
    again = trainer(max_epochs=3, precision=precision)
    again.fit(resumed, ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True)
    assert again.global_step == uninterrupted.global_step == 3 * BATCHES
    assert_same(resumed, whole)
    assert_same(again.optimizers[0], uninterrupted.optimizers[0])
    schedules = [t.lr_scheduler_configs[0].scheduler.state_dict() for t in (again, uninterrupted)]
    assert schedules[0] == schedules[1]


def test_a_resumed_run_differs_without_its_optimizer_state(tmp_path):
    """The test above can fail: what it compares depends on the state."""

    class Configured(Net):
        configure_optimizers = optimize_with(NAMO, **HYPER)

        def train_dataloader(self) -> Resumable:
            return Resumable()

    whole, resumed = Configured(), Configured()
    fit(whole, checkpoints(tmp_path, every_n_train_steps=4), enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    fresh = copy.deepcopy(resumed).configure_optimizers()
    checkpoint["optimizer_states"] = [fresh.state_dict()]
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    trainer().fit(resumed, ckpt_path=str(tmp_path / "forgetful.ckpt"))
    assert not torch.equal(resumed.head.weight, whole.head.weight)
