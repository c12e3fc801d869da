"""Lightning's learning rate finder: its suggestion is the rate of the next fit, or a warning says why it is not."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, OptimizerCallback, WarmupStableDecay, optimize_with
from tests.helpers.rules import BUILT_IN
from tests.helpers.toy import BATCHES, Net, trainer

OPTIMIZERS = [*BUILT_IN, torch.optim.AdamW]
DEFAULTS = {NAMO: 0.01, NAMOD: 0.01, Muon: 1e-3, AdaMuon: 1e-3, torch.optim.AdamW: 1e-3}
UNFOLLOWED = "nothing follows it"


class WithAttribute(Net):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr


class WithLearningRate(Net):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.learning_rate = lr


class WithHyperParameter(Net):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()


MODULES = [WithAttribute, WithLearningRate, WithHyperParameter]


def rate(module: pl.LightningModule) -> float:
    holder = module.hparams if isinstance(module, WithHyperParameter) else module
    return holder.learning_rate if isinstance(module, WithLearningRate) else holder.lr


class Rates(pl.Callback):
    """The learning rates that the groups really have in a step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({group.get("name", "all"): group["lr"] for group in optimizer.param_groups})


def by_the_line(
    kind: Any, start: float, cls: Any, schedule: Any = None, **hyper: Any
) -> tuple[pl.LightningModule, list[pl.Callback]]:
    configure = optimize_with(cls, schedule=schedule, **hyper)
    return type(kind.__name__, (kind,), {"configure_optimizers": configure})(start), []


def by_the_callback(
    kind: Any, start: float, cls: Any, schedule: Any = None, **hyper: Any
) -> tuple[pl.LightningModule, list[pl.Callback]]:
    return kind(start), [OptimizerCallback(partial(cls, **hyper), schedule)]


both_entries = pytest.mark.parametrize("entry", [by_the_line, by_the_callback])


def find(module: pl.LightningModule, callbacks: list[pl.Callback], **options: Any) -> float:
    """Let Lightning's Tuner find a learning rate; what it suggests is on the module then."""
    found = Tuner(trainer(*callbacks, max_epochs=10)).lr_find(
        module, min_lr=1e-4, max_lr=0.5, num_training=20, **options
    )
    assert found is not None
    suggestion = found.suggestion()
    assert suggestion is not None
    return suggestion


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], **options: Any) -> list[dict[str, float]]:
    rates = Rates()
    trainer(*callbacks, rates, **options).fit(module)
    return rates.steps


def said(found: list[warnings.WarningMessage], text: str) -> bool:
    return any(text in str(warning.message) for warning in found)


@both_entries
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
@pytest.mark.parametrize(
    ("cls", "kind"), [*((cls, WithAttribute) for cls in OPTIMIZERS), *((NAMO, kind) for kind in MODULES[1:])]
)
def test_the_next_fit_has_the_suggested_rate(cls, given, kind, entry):
    start = 0.02 if given else DEFAULTS[cls]
    module, callbacks = entry(kind, start, cls, **({"lr": start} if given else {}))
    suggestion = find(module, callbacks)
    assert rate(module) == suggestion != start
    for _ in range(2):
        steps = fit(module, callbacks)
        assert len(steps) == 2 * BATCHES
        assert all(set(rates.values()) == {suggestion} for rates in steps)


@both_entries
def test_an_adamw_rate_of_its_own_stays(entry):
    module, callbacks = entry(WithAttribute, 0.02, NAMO, lr=0.02, adamw_lr=0.02)
    suggestion = find(module, callbacks)
    assert suggestion != 0.02
    assert fit(module, callbacks)[-1] == {"matrices": suggestion, "adamw": 0.02}


@both_entries
def test_a_schedule_starts_from_the_suggested_rate(entry):
    module, callbacks = entry(WithAttribute, 0.01, NAMO, WarmupStableDecay(warmup=4), adamw_lr=0.002)
    suggestion = find(module, callbacks)
    steps = fit(module, callbacks)
    assert steps[0] == pytest.approx({"matrices": suggestion / 4, "adamw": 0.002 / 4})
    assert steps[-1] == pytest.approx({"matrices": suggestion, "adamw": 0.002})


@both_entries
def test_groups_that_are_added_later_have_the_suggested_rate(entry):
    module, callbacks = entry(WithAttribute, 0.01, NAMO)
    module.backbone.requires_grad_(False)
    module.lr = 0.01
    fit(module, callbacks)
    module.lr = 0.3
    training = trainer(*callbacks)
    training.fit(module)
    module.backbone.requires_grad_(True)
    training.optimizers[0].add_param_group({"params": list(module.backbone.parameters())})
    assert [group["lr"] for group in training.optimizers[0].param_groups] == [0.3] * 3


@both_entries
@pytest.mark.parametrize("name", ["lr", "rate"])
def test_an_attribute_of_another_name_is_followed_where_the_finder_is_told_it(name, entry):
    module, callbacks = entry(WithAttribute, 0.01, NAMO)
    setattr(module, name, 0.01)
    suggestion = find(module, callbacks, attr_name=name)
    assert getattr(module, name) == suggestion
    assert set(fit(module, callbacks)[-1].values()) == {suggestion}


@both_entries
def test_an_attribute_that_was_another_number_is_not_followed_and_a_warning_says_so(entry):
    module, callbacks = entry(WithAttribute, 0.5, NAMO, lr=0.02)
    suggestion = find(module, callbacks)
    with pytest.warns(
        UserWarning, match=rf"WithAttribute\.lr is {suggestion} now and was 0\.5.*{UNFOLLOWED}.*is 0\.02"
    ):
        steps = fit(module, callbacks)
    assert set(steps[-1].values()) == {0.02}


@both_entries
@pytest.mark.parametrize("lr", [0.01, 0.5, None, "fast"])
def test_an_attribute_that_does_not_change_is_no_matter(lr, entry):
    module, callbacks = entry(WithAttribute, lr, NAMO)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            assert set(fit(module, callbacks)[-1].values()) == {0.01}
    assert not said(found, UNFOLLOWED)


def test_the_rate_given_by_the_module_itself_is_taken_as_it_is():
    class Net(WithAttribute):
        def configure_optimizers(self) -> Any:
            return optimize_with(NAMO, lr=self.lr, adamw_lr=self.lr / 5)(self)

    module = Net(0.02)
    suggestion = find(module, [])
    assert fit(module, [])[-1] == {"matrices": suggestion, "adamw": suggestion / 5}


def test_a_rate_that_cannot_be_is_refused():
    module, callbacks = by_the_line(WithAttribute, 0.01, NAMO)
    fit(module, callbacks)
    module.lr = -1.0
    with pytest.raises(ValueError, match=r"NAMO: expected lr to be a finite number >= 0 but got -1\.0"):
        fit(module, callbacks)


# --- the callback, which finds the rate at the start of the fit that is to have it ------------------

FINDER = {"min_lr": 1e-4, "max_lr": 0.5, "num_training_steps": 20}


@both_entries
def test_the_fit_of_the_finders_callback_has_the_suggested_rate_and_the_next_one_too(entry):
    module, callbacks = entry(WithAttribute, 0.01, NAMO)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        steps = fit(module, [LearningRateFinder(**FINDER), *callbacks], max_epochs=6)
    assert not said(found, "LearningRateFinder")
    assert module.lr != 0.01
    assert set(steps[-1].values()) == {module.lr}
    assert set(fit(module, callbacks)[-1].values()) == {module.lr}


@both_entries
@pytest.mark.parametrize(
    ("options", "words"),
    [({"schedule": WarmupStableDecay(warmup=2)}, "the schedule sets"), ({"adamw_lr": 0.002}, "of the AdamW groups")],
)
def test_where_the_fit_of_the_finders_callback_cannot_have_it_a_warning_says_what_to_do(options, words, entry):
    module, callbacks = entry(WithAttribute, 0.01, NAMO, **options)
    with pytest.warns(UserWarning, match=rf"LearningRateFinder .*{words}.*Tuner\(trainer\)\.lr_find"):
        fit(module, [LearningRateFinder(**FINDER), *callbacks], max_epochs=6)
    assert fit(module, callbacks)[-1]["matrices"] == pytest.approx(module.lr)


def test_the_tuner_is_not_warned_of():
    module, callbacks = by_the_line(WithAttribute, 0.01, NAMO, adamw_lr=0.002)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        find(module, callbacks)
    assert not said(found, "LearningRateFinder")
