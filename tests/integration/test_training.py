"""What goes on around a step (loss scaling, accumulation, several fits, averaged weights) is as with AdamW."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_namo import (
    OptimizerCallback,
    WarmupStableDecay,
    build_optimizer,
    optimize_with,
)
from tests.helpers.rules import BUILT_IN
from tests.helpers.toy import (
    BATCH_SIZE,
    BATCHES,
    HYPER,
    Net,
    Resumable,
    assert_same,
    batches,
    checkpoints,
    fit,
    net_with,
    train_plainly,
    trainer,
)

OURS = {cls.__name__: partial(cls, **HYPER) for cls in BUILT_IN}
ALL = {**OURS, "AdamW": partial(AdamW, lr=0.02)}
every_optimizer = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def frozen(module: nn.Module, optimizer: Optimizer) -> tuple[dict, dict]:
    """Copies of all weights and of the whole state."""
    return copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))


# --- torch.amp.GradScaler, in a plain loop ---------------------------------------------------------


def train_scaled(
    net: Net, optimizer: Optimizer, scaler: GradScaler, data: list, poison: Callable[[int], None] | None = None
) -> Iterator[int]:
    """A step a batch; gives the number of each step after it."""
    for number, batch in enumerate(data):
        optimizer.zero_grad()
        scaler.scale(net.loss(batch)).backward()
        if poison is not None:
            poison(number)
        scaler.step(optimizer)
        scaler.update()
        yield number


@every_optimizer
def test_a_changing_scale_gives_the_bits_of_a_run_without_a_scaler(make) -> None:
    plain, net = Net(), Net()
    expected, optimizer = build_optimizer(plain, make), build_optimizer(net, make)
    for batch in batches() * 2:
        expected.zero_grad()
        plain.loss(batch).backward()
        expected.step()
    scaler, scales = GradScaler("cpu", init_scale=2.0**5, growth_interval=1), []
    for number in train_scaled(net, optimizer, scaler, batches() * 2):
        scales.append(scaler.get_scale())
        if number == 6:
            scaler.update(2.0**-4)  # a power of two, as all scales are: the division leaves no rounding
    assert max(scales) > 2**7 * min(scales)
    assert_same(net, plain)
    assert_same(optimizer, expected)  # v among it


@every_optimizer
@pytest.mark.parametrize("where", ["backbone.0.weight", "head.bias", "backbone.1.weight"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_anywhere_skips_the_step_and_touches_nothing(make, where: str, value: float) -> None:
    net, twin = Net(), Net()
    optimizer, expected = build_optimizer(net, make), build_optimizer(twin, make)

    def poison(number: int) -> None:
        before.append(frozen(net, optimizer))
        if number in (0, 3):
            net.get_parameter(where).grad.view(-1)[1] = value

    before: list[tuple[dict, dict]] = []
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for number in train_scaled(net, optimizer, scaler, batches(), poison):
        if number in (0, 3):
            assert_same(frozen(net, optimizer), before[number])
        else:
            assert not torch.equal(net.head.weight, before[number][0]["head.weight"])
    assert scaler.get_scale() == 2.0**8
    good = [batch for number, batch in enumerate(batches()) if number not in (0, 3)]
    for _ in train_scaled(twin, expected, GradScaler("cpu"), good):
        pass
    assert_same(net, twin)
    assert_same(optimizer, expected)
    if not isinstance(optimizer, AdamW):
        assert optimizer.skipped_steps() == 0  # the scaler's skips are not counted as ours


@every_optimizer
def test_gradients_that_overflow_in_float16_are_skipped_until_the_scale_fits(make) -> None:
    net = Net()
    optimizer, scaler = build_optimizer(net, make), GradScaler("cpu", init_scale=2.0**22)
    for parameter in net.parameters():
        parameter.register_hook(lambda grad: grad.half().float())
    start, scales = frozen(net, optimizer), []
    for _ in train_scaled(net, optimizer, scaler, batches() * 3):
        if scales and scaler.get_scale() == scales[-1]:
            break
        assert_same(frozen(net, optimizer), start)
        scales.append(scaler.get_scale())
    assert len(scales) > 3, "it overflowed several times"
    assert not torch.equal(net.head.weight, start[0]["head.weight"])
    assert all(tensor.isfinite().all() for state in optimizer.state.values() for tensor in state.values())


# --- the same through Lightning --------------------------------------------------------------------


class Before(pl.Callback):
    """Weights and state before each step, whether the scaler then skipped it, and weights after it."""

    def __init__(self) -> None:
        self.skipped: list[bool] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Net, optimizer: Optimizer) -> None:
        self.before, self.scale = frozen(pl_module, optimizer), trainer.scaler.get_scale()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Net, *args: object) -> None:
        after = frozen(pl_module, trainer.optimizers[0])
        self.skipped.append(trainer.scaler.get_scale() < self.scale)
        if self.skipped[-1]:
            assert_same(after, self.before)
        else:
            assert not torch.equal(after[0]["head.weight"], self.before[0]["head.weight"])


@every_optimizer
def test_16_mixed_with_its_scaler_skips_and_trains(make) -> None:
    """Real float16 on the CPU: the Trainer's own "16-mixed" is bfloat16 there, so the plugin is made by hand."""
    net, plain = Net(), Net()
    plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**20))
    watch = Before()
    fitted = fit(net, OptimizerCallback(make), watch, plugins=[plugin], max_epochs=4)
    skips = sum(watch.skipped)
    assert watch.skipped[:2] == [True, True]
    assert skips < BATCHES
    assert fitted.global_step == 4 * BATCHES  # Lightning counts skipped steps too, whatever the optimizer
    steps = {int(state["step"]) for state in fitted.optimizers[0].state.values()}
    assert steps == {4 * BATCHES - skips}
    optimizer = build_optimizer(plain, make)
    for batch, skipped in zip(batches() * 4, watch.skipped, strict=True):
        if not skipped:
            optimizer.zero_grad()
            plain.loss(batch).backward()
            optimizer.step()
    moved = (plain.head.weight - Net().head.weight).norm()
    assert (net.head.weight - plain.head.weight).norm() < 0.1 * moved


@ours
def test_a_run_with_a_scaler_resumes_identically(make, tmp_path: Path) -> None:
    class Net16(Net):
        configure_optimizers = optimize_with(make)

        def train_dataloader(self) -> Resumable:
            return Resumable()

    def scaling() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**20, growth_interval=2))

    whole, resumed = Net16(), Net16()
    saving = checkpoints(tmp_path, every_n_train_steps=8)
    uninterrupted = fit(whole, saving, plugins=[scaling()], max_epochs=3, enable_checkpointing=True)
    again = trainer(plugins=[scaling()], max_epochs=3)
    again.fit(resumed, ckpt_path=str(tmp_path / "step=8.ckpt"), weights_only=True)
    assert_same(resumed, whole)
    assert_same(again.optimizers[0], uninterrupted.optimizers[0])
    assert again.scaler.state_dict() == uninterrupted.scaler.state_dict()


# --- accumulation ----------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("accumulated", [2, 3])
def test_accumulated_batches_train_as_one_large_batch(make, accumulated: int) -> None:
    def loader(size: int) -> DataLoader:
        x, y = (torch.cat(part).double() for part in zip(*batches(), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=size)

    make = make if make.func is AdamW else partial(make, orthogonalizer="svd")
    nets, steps = (Net(), Net()), []
    for net, size, accumulate in zip(nets, (BATCH_SIZE, accumulated * BATCH_SIZE), (accumulated, 1), strict=True):
        fitting = trainer(OptimizerCallback(make), precision="64-true", accumulate_grad_batches=accumulate)
        fitting.fit(net, loader(size))
        steps.append(fitting.global_step)
    assert steps == [2 * BATCHES // accumulated] * 2
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-8, atol=1e-9)
    assert (nets[0].head.weight - Net().head.weight).abs().max() > 1e-2


# --- several fits, and validation between them -----------------------------------------------------


def configured(make: Callable[..., Optimizer], how: str) -> tuple[Net, list[pl.Callback]]:
    if how == "callback":
        return Net(), [OptimizerCallback(make)]
    return net_with(optimize_with(make)), []


def by_hand(net: Net, make: Callable[..., Optimizer], *epochs: int) -> tuple[Net, Optimizer]:
    """Train by a plain loop, with a new optimizer for every number of epochs."""
    for count in epochs:
        optimizer = build_optimizer(net, make)
        train_plainly(net, optimizer, count)
    return net, optimizer


@every_optimizer
@pytest.mark.parametrize("how", ["callback", "one line"])
@pytest.mark.parametrize("validate", [False, True])
def test_a_second_fit_starts_a_new_optimizer_with_any_optimizer(make, how: str, validate: bool) -> None:
    """Lightning calls configure_optimizers in every fit: weights go on, and the state starts anew, AdamW's too."""
    net, callbacks = configured(make, how)
    fitting = trainer(*callbacks, max_epochs=1, limit_val_batches=2, num_sanity_val_steps=2)
    fitting.fit(net)
    first = fitting.optimizers[0]
    if validate:
        before = frozen(net, first)
        fitting.validate(net, verbose=False)
        assert_same(frozen(net, first), before)
    fitting.fit_loop.max_epochs = 3
    fitting.fit(net)
    assert fitting.global_step == 3 * BATCHES
    assert fitting.optimizers[0] is not first
    expected, optimizer = by_hand(Net(), make, 1, 2)
    assert_same(net, expected)
    assert_same(fitting.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"])


@every_optimizer
@pytest.mark.parametrize("how", ["callback", "one line"])
def test_a_second_fit_from_the_checkpoint_of_the_first_keeps_the_state(make, how: str, tmp_path: Path) -> None:
    net, callbacks = configured(make, how)
    fitting = trainer(*callbacks, max_epochs=1)
    fitting.fit(net)
    fitting.save_checkpoint(tmp_path / "first.ckpt")
    fitting.fit_loop.max_epochs = 3
    fitting.fit(net, ckpt_path=str(tmp_path / "first.ckpt"))
    expected, optimizer = by_hand(Net(), make, 3)
    assert_same(net, expected)
    assert_same(fitting.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"])


# --- averaged weights ------------------------------------------------------------------------------


class Averages(pl.Callback):
    """The weights after every step, and those that validation sees."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Net, *args: object) -> None:
        self.trained.append(pl_module.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Net, *args: object) -> None:
        self.validated.append(pl_module.head.weight.detach().clone())


@every_optimizer
def test_validation_of_the_average_does_not_disturb_training(make) -> None:
    watch, plain = Averages(), Averages()
    averaging = EMAWeightAveraging(decay=0.5)
    options = {"limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}
    fit(Net(), OptimizerCallback(make), averaging, watch, **options)
    fit(Net(), OptimizerCallback(make), plain)
    assert_same(watch.trained, plain.trained)
    average, averages = watch.trained[0], []
    for weight in watch.trained:
        average = average.lerp(weight, 0.5)
        averages.append(average)
    expected = [averages[step - 1] for step in range(3, 2 * BATCHES + 1, 3)]
    torch.testing.assert_close(watch.validated, expected, rtol=0, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("how", ["callback", "one line"])
def test_a_run_with_averaged_weights_resumes_identically(make, ema: bool, how: str, tmp_path: Path) -> None:
    def run(folder: Path | None, **options: object) -> tuple[Net, Averages, pl.Trainer]:
        net, callbacks = configured(make, how)
        net.train_dataloader = Resumable
        averaging = EMAWeightAveraging(decay=0.8) if ema else WeightAveraging()
        saving = [] if folder is None else [checkpoints(folder, every_n_train_steps=8)]
        watch = Averages()
        fitting = trainer(*callbacks, averaging, watch, *saving, max_epochs=3, enable_checkpointing=bool(saving))
        fitting.fit(net, **options)
        return net, watch, fitting

    whole, watched, uninterrupted = run(tmp_path)
    resumed, watched_again, again = run(None, ckpt_path=str(tmp_path / "step=8.ckpt"))
    assert_same(watched_again.trained, watched.trained[8:])
    assert_same(resumed, whole)  # the averages
    assert not torch.equal(whole.head.weight, watched.trained[-1])
    assert_same(again.optimizers[0], uninterrupted.optimizers[0])


@every_optimizer
def test_an_averaged_model_of_torch_follows_the_trained_one(make) -> None:
    net, twin = Net(), Net()
    optimizer = build_optimizer(net, make)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average = None
    for batch in batches():
        optimizer.zero_grad()
        net.loss(batch).backward()
        optimizer.step()
        averaged.update_parameters(net)
        average = net.head.weight if average is None else average.lerp(net.head.weight, 0.5)
        average = average.detach().clone()
    assert_same(net, by_hand(twin, make, 1)[0])
    torch.testing.assert_close(averaged.module.head.weight.detach(), average, rtol=0, atol=1e-6)


@ours
def test_a_schedule_goes_on_over_a_scaler_s_skips_as_with_adamw(make) -> None:
    """Lightning steps the schedule after each batch, also one whose step was skipped."""
    rates = {}
    for name, of in (("ours", make), ("AdamW", ALL["AdamW"])):
        plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**20))
        schedule = WarmupStableDecay(warmup=4, decay=0.5)
        fitted = fit(Net(), OptimizerCallback(of, schedule), watch := Before(), plugins=[plugin])
        assert any(watch.skipped)
        rates[name] = fitted.lr_scheduler_configs[0].scheduler.last_epoch
    assert rates["ours"] == rates["AdamW"] == 2 * BATCHES
