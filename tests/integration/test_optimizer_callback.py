"""OptimizerCallback in real runs of the Trainer: with every option that touches an optimizer, and from YAML."""

import copy
import pickle
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, LearningRateMonitor, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_namo import NAMO, NAMOD, OptimizerCallback, WarmupStableDecay, build_optimizer, optimize_with
from tests.helpers.optimizers import all_optimizers
from tests.helpers.rules import taken
from tests.helpers.toy import BATCHES, HYPER, Net, SgdNet, assert_same, batches, checkpoints, fit, trainer

REPLACES = "OptimizerCallback replaces the configure_optimizers"
NOT_FINITE = "their gradients were not finite"


class NamoNet(Net):
    configure_optimizers = optimize_with(NAMO, **HYPER)


def namo() -> OptimizerCallback:
    return OptimizerCallback(partial(NAMO, **HYPER))


def matched(found: list[warnings.WarningMessage], *texts: str) -> list[str]:
    return [str(w.message) for w in found if any(text in str(w.message) for text in texts)]


# --- in place of the module's own configure_optimizers --------------------------------------------


@all_optimizers
def test_a_module_without_configure_optimizers_trains_as_with_the_one_line(cls):
    options = {"schedule": WarmupStableDecay(warmup=3, decay=0.5), "adamw": "head.weight"}
    module = Net()
    edited = type("Edited", (Net,), {"configure_optimizers": optimize_with(cls, **options, **taken(cls, HYPER))})()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, OptimizerCallback(partial(cls, **taken(cls, HYPER)), **options))
    assert not matched(found, "configure_optimizers", "OptimizerCallback")
    fit(edited)
    assert_same(module, edited)
    assert not torch.equal(module.head.weight, Net().head.weight)


def test_the_users_own_is_replaced_with_a_warning_and_given_back():
    module, expected = SgdNet(), NamoNet()
    with pytest.warns(UserWarning, match=f"{REPLACES} of SgdNet"):
        fit(module, namo())
    fit(expected)
    assert_same(module, expected)
    assert "configure_optimizers" not in vars(module)
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_configure_optimizers_of_the_instance_is_given_back(run):
    module = Net()
    own = partial(SgdNet.configure_optimizers, module)
    module.configure_optimizers = own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(trainer(namo(), max_epochs=1, limit_val_batches=1), run)(module)
    assert module.configure_optimizers is own


def test_a_module_without_its_own_is_left_without_one():
    module = Net()
    fit(module, namo(), max_epochs=1)
    assert "configure_optimizers" not in vars(module)
    assert type(module).configure_optimizers is pl.LightningModule.configure_optimizers


class Failing(Net):
    def on_train_batch_end(self, *args: object) -> None:
        raise ZeroDivisionError


def test_a_module_is_given_back_after_a_fit_that_failed():
    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(module, namo())
    assert "configure_optimizers" not in vars(module)


def test_attach_serves_where_no_trainer_does():
    module, expected = Net(), Net()
    callback = namo()
    callback.attach(module)
    callback.attach(module)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, callback)
    assert not matched(found, REPLACES)
    fit(expected, namo())
    assert_same(module, expected)
    assert "configure_optimizers" not in vars(module)


def test_attach_warns_before_it_replaces_the_users_own():
    with pytest.warns(UserWarning, match=REPLACES):
        namo().attach(SgdNet())


def test_one_callback_serves_several_fits():
    callback, module, expected = namo(), Net(), NamoNet()
    other = Net()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, callback)
        fit(other, callback)
        fit(module, callback)
    assert not matched(found, REPLACES, NOT_FINITE)
    fit(expected)
    assert_same(other, expected)
    fit(expected)
    assert_same(module, expected)


def test_one_trainer_serves_several_fits():
    first, second = trainer(namo(), max_epochs=1), trainer(max_epochs=1)
    module, expected = Net(), NamoNet()
    for training, trained in ((first, module), (second, expected)):
        training.fit(trained)
        training.fit_loop.max_epochs = 3
        training.fit(trained)
    assert first.global_step == second.global_step == 3 * BATCHES
    assert_same(module, expected)


class NotAttached(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert "configure_optimizers" not in vars(pl_module)
        trainer.seen = True


@pytest.mark.parametrize("module", [Net, SgdNet, NamoNet])
def test_validation_needs_no_optimizer_and_attaches_none(module):
    validating = trainer(namo(), NotAttached(), limit_val_batches=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        validating.validate(module(), verbose=False)
    assert validating.seen
    assert not matched(found, "configure_optimizers", "OptimizerCallback")


def test_validation_during_a_fit_changes_nothing():
    module, expected = Net(), Net()
    fit(module, namo(), limit_val_batches=2, val_check_interval=2)
    fit(expected, namo())
    assert_same(module, expected)


def test_a_fast_dev_run_takes_one_step():
    assert fit(Net(), namo(), fast_dev_run=True).global_step == 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.AdamW, lr=0.02, weight_decay=0.3)])
def test_torchs_adamw_is_the_baseline(optimizer):
    class ByHand(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

    module, expected = Net(), ByHand()
    trained = fit(module, OptimizerCallback(optimizer))
    fit(expected)
    assert type(trained.optimizers[0]) is torch.optim.AdamW
    assert_same(module, expected)


@pytest.mark.parametrize("foreign", ["all", "one"])
def test_an_optimizer_over_other_parameters_raises_instead_of_training_nothing(foreign):
    def over_a_copy(groups: list[dict]) -> torch.optim.Optimizer:
        params = [p for group in copy.deepcopy(list(groups)) for _, p in group["params"]]
        if foreign == "one":
            params[1:] = [p for group in groups for _, p in group["params"]][1:]
        return torch.optim.SGD(params, lr=0.1)

    with pytest.raises(RuntimeError, match=r"parameters of SGD to be the module's.*after it is sharded"):
        fit(Net(), OptimizerCallback(over_a_copy))


def test_an_optimizer_configured_before_the_module_was_replaced_raises():
    class Replacing(Net):
        def on_train_start(self) -> None:
            self.head = nn.Linear(10, 3)

    with pytest.raises(RuntimeError, match=r"head\.weight of Replacing no longer is"):
        fit(Replacing(), namo())


def test_globs_and_blocks_reach_the_routing():
    callback = OptimizerCallback(adamw=["head.*"], orthogonalize="backbone.0.weight", blocks={"backbone.0.weight": 3})
    groups = fit(Net(), callback, max_epochs=1).optimizers[0].param_groups
    assert [group["param_names"] for group in groups if group["orthogonalize"]] == [
        ["backbone.0.weight"],
        ["backbone.3.weight"],
    ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_of_the_callback_trains_alike(copied):
    callback = OptimizerCallback(partial(NAMO, **HYPER), WarmupStableDecay(warmup=3), adamw="head.weight")
    module, expected = Net(), Net()
    fit(module, copied(callback))
    fit(expected, callback)
    assert_same(module, expected)


# --- the Trainer's options ------------------------------------------------------------------------


def train_with_options(module: Net, *, accumulate: int = 1, clip: object = None, autocast: bool = False) -> Net:
    """What the Trainer is to do in two epochs, by hand."""
    optimizer = build_optimizer(module, NAMO, **HYPER)
    for number, batch in enumerate(batches() * 2, start=1):
        batch = [part.to(module.head.weight.dtype) for part in batch]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.loss(batch) / accumulate
        loss.backward()
        if number % BATCHES % accumulate == 0:  # the Trainer also steps at an epoch's end
            if clip is not None:
                clip([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
            optimizer.zero_grad()
    return module


OPTIONS = {
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "accumulation with a rest": ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "clipping by norm": ({"gradient_clip_val": 0.1}, {"clip": partial(nn.utils.clip_grad_norm_, max_norm=0.1)}),
    "clipping by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": partial(nn.utils.clip_grad_value_, clip_value=0.01)},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": True}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_the_trainer_trains_as_done_by_hand(option):
    options, by_hand = OPTIONS[option]
    module, expected, without = Net(), train_with_options(Net(), **by_hand), train_with_options(Net())
    fit(module, namo(), **options)
    assert_same(module, expected)
    assert not torch.equal(expected.head.weight, without.head.weight)


def test_bf16_true_trains_as_done_by_hand_and_keeps_float32_statistics():
    module = Net()
    optimizer = fit(module, namo(), precision="bf16-true").optimizers[0]
    assert_same(module, train_with_options(Net().bfloat16()))
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    statistics = [state[key] for state in optimizer.state.values() for key in ("step", "v") if key in state]
    assert {statistic.dtype for statistic in statistics} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_submodule_trains_as_an_eager_one():
    module = Net()
    module.backbone = torch.compile(module.backbone, backend="aot_eager")
    optimizer = fit(module, namo()).optimizers[0]
    assert optimizer.param_groups[0]["param_names"] == ["backbone.0.weight", "backbone.3.weight"]
    expected = Net()
    fit(expected, namo())
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert (expected.head.weight - Net().head.weight).abs().max() > 1e-2


class Trace(pl.Callback):
    """Keeps the head's weight after every step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Net, *args: object) -> None:
        self.weights.append(pl_module.head.weight.detach().clone())


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("decay", [0.5, None])
def test_weight_averaging_averages_what_the_optimizer_trained(attached, decay):
    averaging = WeightAveraging() if decay is None else EMAWeightAveraging(decay=decay)
    module, callback, trace, plain = Net(), namo(), Trace(), Net()
    if attached:
        callback.attach(module)
    fit(module, callback, averaging, trace)
    fit(plain, namo())
    assert_same(trace.weights[-1], plain.head.weight.detach())
    average = trace.weights[0]
    for step, weight in enumerate(trace.weights[1:], start=2):
        average = average.lerp(weight, 1 / step if decay is None else 1 - decay)
    torch.testing.assert_close(module.head.weight.detach(), average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [None, WarmupStableDecay(warmup=4)])
def test_the_learning_rate_monitor_tells_the_groups_by_name(schedule, tmp_path):
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trained = fit(
            Net(),
            OptimizerCallback(partial(NAMO, adamw_betas=(0.8, 0.9), **HYPER), schedule),
            monitor,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=1,
        )
    assert not matched(found, "momentum")
    logged = {key: value.item() for key, value in trained.callback_metrics.items() if key.startswith("lr-")}
    assert logged == pytest.approx(
        {
            "lr-NAMO/matrices": 0.02,
            "lr-NAMO/matrices-momentum": 0.95,
            "lr-NAMO/matrices-weight_decay": 0.2,
            "lr-NAMO/adamw": 0.005,
            "lr-NAMO/adamw-momentum": 0.8,
            "lr-NAMO/adamw-weight_decay": 0.0,
        }
    )
    share = 0.25 if schedule else 1
    assert monitor.lrs["lr-NAMO/matrices"][0] == pytest.approx(0.02 * share)
    assert monitor.lrs["lr-NAMO/adamw"][0] == pytest.approx(0.005 * share)


# --- fine-tuning ----------------------------------------------------------------------------------


class Finetuning(BackboneFinetuning):
    """Unfreezes the backbone for the second epoch, and on resume, where Lightning's leaves it frozen."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        if id(pl_module.backbone[0].weight) in trained:
            self.make_trainable(pl_module.backbone)


@pytest.mark.parametrize("finetuning_first", [True, False])
def test_matrices_that_are_unfrozen_later_are_orthogonalized_and_biases_take_adamw(finetuning_first):
    module = Net()
    callbacks = [Finetuning(), namo()] if finetuning_first else [namo(), Finetuning()]
    trace = Trace()
    optimizer = fit(module, *callbacks, trace, max_epochs=3).optimizers[0]
    names = {id(p): name for name, p in module.named_parameters()}
    routed = {
        group["name"]: (group["orthogonalize"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    }
    assert routed == {
        "adamw": (False, ["head.weight", "head.bias"]),
        "matrices": (True, ["backbone.0.weight", "backbone.3.weight"]),
        "adamw_2": (False, ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.3.bias"]),
    }
    steps = {names[id(p)]: state["step"].item() for p, state in optimizer.state.items()}
    assert {name: 3 * BATCHES if "head" in name else 2 * BATCHES for name in names.values()} == steps
    for p, start in zip(module.parameters(), Net().parameters(), strict=True):
        assert not torch.equal(p, start)


def test_a_backbone_stays_as_it_is_while_frozen():
    module = Net()
    fit(module, Finetuning(), namo(), max_epochs=1)
    assert_same(module.backbone, Net().backbone)


def test_unfrozen_groups_start_at_the_ratio_of_the_learning_rates():
    optimizer = fit(Net(), Finetuning(), namo(), max_epochs=2).optimizers[0]
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"adamw": 0.005, "matrices": 0.0005, "adamw_2": 0.000125})


@all_optimizers
def test_a_fine_tuning_run_resumed_after_the_unfreezing_equals_the_uninterrupted_one(cls, tmp_path):
    def callbacks() -> list[pl.Callback]:
        return [Finetuning(), OptimizerCallback(partial(cls, **taken(cls, HYPER)))]

    whole, resumed = Net(), Net()
    saving = checkpoints(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    uninterrupted = fit(whole, *callbacks(), saving, max_epochs=4, enable_checkpointing=True)
    again = trainer(*callbacks(), max_epochs=4)
    again.fit(resumed, ckpt_path=str(tmp_path / f"step={2 * BATCHES}.ckpt"), weights_only=True)
    assert_same(resumed, whole)
    assert_same(again.optimizers[0], uninterrupted.optimizers[0])


def test_a_schedule_drives_groups_that_are_unfrozen_later():
    callback = OptimizerCallback(partial(NAMO, **HYPER), WarmupStableDecay(warmup=2, decay=5))
    optimizer = fit(Net(), Finetuning(), callback, max_epochs=3).optimizers[0]
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"adamw": 0.0005, "matrices": 0.00005, "adamw_2": 0.0000125})


# --- gradients that are not finite ----------------------------------------------------------------


def warned_of_gradients(found: list[warnings.WarningMessage]) -> list[int]:
    """How many updates each warning says were skipped."""
    return [int(text.split()[0]) for text in matched(found, NOT_FINITE)]


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [3, 3, 3, 3]), (3, [3, 3, 3, 3]), (6, [6, 6]), (12, [12]), (5, [6, 3, 3]), (50, [12])]
)
def test_bad_batches_are_survived_and_reported(every, expected):
    module = Net(poisoned=(2, 4))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer = fit(module, namo(), log_every_n_steps=every).optimizers[0]
    assert optimizer.skipped_steps() == 3 * 2 * 2  # matrices and the AdamW group, batches, epochs
    assert warned_of_gradients(found) == expected
    assert all(p.isfinite().all() for p in module.parameters())
    assert not torch.equal(module.head.weight, Net().head.weight)


def test_good_batches_are_not_reported():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(Net(), namo(), log_every_n_steps=1)
    assert not warned_of_gradients(found)


def test_a_run_with_bad_batches_equals_the_run_without_them():
    class Without(Net):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    module, expected = Net(poisoned=(2,)), Without()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, namo())
        fit(expected, namo())
    assert_same(module, expected)


def test_every_fit_is_counted_by_itself():
    callback, counts = namo(), []
    for poisoned in ((1, 2), (3,)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fit(Net(poisoned), callback, max_epochs=1, log_every_n_steps=6)
        counts.append(warned_of_gradients(found))
    assert counts == [[6], [3]]


def test_a_resumed_run_does_not_report_what_was_reported_before(tmp_path):
    saving = checkpoints(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(poisoned=(1,)), namo(), saving, max_epochs=1, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        resumed = trainer(namo(), max_epochs=2, log_every_n_steps=1)
        resumed.fit(Net(), ckpt_path=str(tmp_path / f"step={BATCHES}.ckpt"))
    assert resumed.optimizers[0].skipped_steps() == 2
    assert warned_of_gradients(found) == []


def test_bad_batches_do_not_disturb_the_baseline():
    class Overfit(Net):
        def on_train_batch_end(self, *args: object) -> None:
            assert self.head.weight.isfinite().all() == (self.trainer.global_step <= 2)

    fit(Overfit(poisoned=(2,)), OptimizerCallback(torch.optim.AdamW), log_every_n_steps=1)


# --- from YAML ------------------------------------------------------------------------------------


YAML = """
seed_everything: false
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: {epochs}
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_namo.OptimizerCallback
      init_args:
        optimizer:
          class_path: lightning_namo.NAMOD
          init_args:
            lr: 0.02
            adamw_lr: 0.005
            weight_decay: 0.2
            clamp: 0.3
            ns_coefficients: polar_express
        schedule:
          class_path: lightning_namo.WarmupStableDecay
          init_args:
            warmup: 3
        adamw: head.weight
        blocks:
          backbone.0.weight: 3
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: {folder}
        filename: "{{step}}"
        save_top_k: -1
        save_on_train_epoch_end: true
"""


def run_cli(folder: object, epochs: int, *arguments: str) -> LightningCLI:
    config = folder / "config.yaml"
    config.write_text(YAML.format(folder=folder, epochs=epochs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LightningCLI(Net, save_config_callback=None, args=["fit", "--config", str(config), *arguments])


def test_yaml_trains_as_python_does(tmp_path):
    cli = run_cli(tmp_path, 2)
    expected = Net()
    optimizer = partial(NAMOD, clamp=0.3, ns_coefficients="polar_express", **HYPER)
    fit(
        expected,
        OptimizerCallback(optimizer, WarmupStableDecay(warmup=3), adamw="head.weight", blocks={"backbone.0.weight": 3}),
    )
    assert_same(cli.model, expected)


def test_a_run_from_yaml_resumes_from_its_checkpoint(tmp_path):
    whole = run_cli(tmp_path, 3)
    resumed = run_cli(tmp_path, 3, "--ckpt_path", str(tmp_path / f"step={2 * BATCHES}.ckpt"), "--weights_only", "true")
    assert_same(resumed.model, whole.model)
    assert_same(resumed.trainer.optimizers[0], whole.trainer.optimizers[0])
