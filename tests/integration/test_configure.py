"""`optimize_with` in real runs of the Trainer."""

import copy
import logging
from functools import partial

import lightning_utilities.core.rank_zero as rank_zero_module
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_namo import NAMO, NAMOD, OptimizerCallback, WarmupStableDecay, build_optimizer, optimize_with
from tests.helpers.optimizers import OPTIMIZERS, all_optimizers
from tests.helpers.rules import taken
from tests.helpers.toy import (
    BATCHES,
    HYPER,
    Net,
    Resumable,
    assert_same,
    checkpoints,
    fit,
    net_with,
    train_plainly,
    trainer,
)


@pytest.mark.parametrize("make", [optimize_with, OptimizerCallback, lambda cls: build_optimizer(nn.Linear(2, 2), cls)])
def test_what_is_no_class_is_refused_at_once(make):
    with pytest.raises(TypeError, match="expected an optimizer class, as NAMOD, but got 'NAMOD'"):
        make("NAMOD")


@pytest.mark.parametrize("make", [optimize_with, lambda cls, **hyper: build_optimizer(nn.Linear(2, 2), cls, **hyper)])
def test_an_argument_that_the_optimizer_does_not_take_is_refused_at_once(make):
    with pytest.raises(TypeError, match=r"expected arguments of NAMO but got clamp\. It takes lr, weight_decay, "):
        make(NAMO, clamp=0.1)
    make(partial(NAMO, lr=0.1), weight_decay=0.1)
    make(lambda params, **hyper: NAMO(params, **hyper), eps=0.1)


@pytest.mark.parametrize("make", [optimize_with, OptimizerCallback])
def test_what_makes_no_schedule_is_refused_at_once(make):
    with pytest.raises(TypeError, match=r"expected schedule to be a WarmupStableDecay, .* but got 'cosine'"):
        make(NAMO, schedule="cosine")


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


@all_optimizers
def test_the_one_line_trains_as_the_plain_loop_does(cls):
    module, twin = net_with(optimize_with(cls, **taken(cls, HYPER))), Net()
    fit(module)
    assert_same(module, train_plainly(twin, build_optimizer(twin, cls, **taken(cls, HYPER))))


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
        configure_optimizers = optimize_with(cls, schedule=WarmupStableDecay(warmup=3, decay=0.5), **taken(cls, HYPER))

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
