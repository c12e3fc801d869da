"""What `ReadingLog` writes: read back from TensorBoard's files, for gradients whose signal and noise are known."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from lightning_namo import NAMO, NAMOD, Muon, OptimizerCallback, ReadingLog, build_optimizer, optimize_with
from lightning_namo.telemetry.noise import Averages, SignalFraction
from lightning_namo.telemetry.reading_log import median
from tests.helpers.launch import run_ranks

FRACTIONS = {"low": 0.05, "middle": 0.3, "high": 0.8}
SHAPE, BATCH, STEPS = (24, 32), 8, 300


class Noise(Dataset[Tensor]):
    """Gradients of samples: noise of unit norm for a batch of `BATCH`."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.randn(len(FRACTIONS), *SHAPE, generator=generator) * math.sqrt(BATCH / math.prod(SHAPE))


class Known(pl.LightningModule):
    """Its gradients are ``sqrt(rho) S + sqrt(1 - rho)`` noise, whatever its weights, with S of unit norm."""

    def __init__(self, fractions: dict[str, float] = FRACTIONS) -> None:
        super().__init__()
        self.fractions = fractions
        for name in fractions:
            self.register_module(name, nn.Linear(SHAPE[1], SHAPE[0], bias=False))
        generator = torch.Generator().manual_seed(1)
        signal = torch.randn(len(fractions), *SHAPE, generator=generator)
        self.signal = signal / torch.linalg.matrix_norm(signal).view(-1, 1, 1)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in self.children():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        grads, losses = batch.mean(dim=0), []
        for i, (name, rho) in enumerate(self.fractions.items()):
            grad = math.sqrt(rho) * self.signal[i] + math.sqrt(1 - rho) * grads[i % len(grads)]
            layer = getattr(self, name)  # W against the gradient, through the layer: FSDP2 gathers what it is called on
            losses.append((layer(torch.eye(SHAPE[1])) * grad.T).sum())
        return torch.stack(losses).sum()


def watching(optimizer: Any, **keys: Any) -> OptimizerCallback:
    """The callback; the last layer of `Known` is as good a matrix as the others."""
    return OptimizerCallback(optimizer, heads="matrix", **keys)


def fit(callback: pl.Callback, module: pl.LightningModule, logger: Any, data: Any, **keys: Any) -> pl.Trainer:
    quiet_trainer = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", logger=logger, callbacks=[callback], **quiet_trainer, **keys)
    trainer.fit(module, data)
    return trainer


def train(
    folder: Path, callback: pl.Callback, module: pl.LightningModule, steps: int = STEPS, seed: int = 0, **keys: Any
) -> dict[str, dict[int, float]]:
    """Scalars by tag and step, of TensorBoard's files."""
    logger, data = TensorBoardLogger(folder, name="", version=""), DataLoader(Noise(BATCH * steps, seed), BATCH)
    fit(callback, module, logger, data, max_steps=steps, **{"log_every_n_steps": 10} | keys)
    return curves(folder)


def curves(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def quiet(cls: Any = NAMO, **keys: Any) -> Any:
    return functools.partial(cls, lr=1e-3, **keys)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("cls", [NAMO, NAMOD])
def test_a_known_signal_is_read_back_within_two_percent(tmp_path: Path, cls: Any, nesterov: bool) -> None:
    found = train(tmp_path, watching(quiet(cls, nesterov=nesterov)), Known())
    for name, rho in FRACTIONS.items():
        of_name = found[f"signal_fraction/{name}.weight"]
        settled = [value for step, value in of_name.items() if step >= 200]
        assert len(settled) >= 9
        assert all(abs(value - rho) < 0.02 for value in settled), (name, settled)
        for step, value in of_name.items():
            scale = found[f"noise_scale/{name}.weight"][step]
            assert scale == pytest.approx(BATCH * (1 - value) / value, rel=1e-4)
        assert f"noise_scale_tokens/{name}.weight" not in found
    last = {name: found[f"signal_fraction/{name}.weight"][STEPS - 1] for name in FRACTIONS}
    for of, name in {"min": "low", "median": "middle", "max": "high"}.items():
        assert found[f"signal_fraction/{of}"][STEPS - 1] == last[name]


def known_under_fsdp2(rank: int, folder: str, name: str, nesterov: bool, own_noise: bool) -> Any:
    callback = watching(quiet({"NAMO": NAMO, "NAMOD": NAMOD}[name], nesterov=nesterov))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with mock.patch("torchmetrics.metric.gather_all_tensors", side_effect=AssertionError("a collective")):
        train(
            Path(folder),
            callback,
            Known(),
            seed=rank * own_noise,
            strategy=strategy,
            devices=2,
            use_distributed_sampler=False,
        )
    return callback.readings._batch, {key: signal.last for key, signal in callback.readings._signals.items()}


@pytest.mark.parametrize(("nesterov", "own_noise"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["NAMO", "NAMOD"])
def test_a_known_signal_is_read_back_under_fsdp2(tmp_path: Path, name: str, nesterov: bool, own_noise: bool) -> None:
    """Where two ranks have noise of their own half of it is left."""
    (batch, first), second = run_ranks(known_under_fsdp2, 2, str(tmp_path), name, nesterov, own_noise)
    assert (batch, first) == second  # to the bit
    assert batch == 2 * BATCH
    found = curves(tmp_path)
    for key, rho in FRACTIONS.items():
        expected = rho / (rho + (1 - rho) / (2 if own_noise else 1))
        settled = [value for step, value in found[f"signal_fraction/{key}.weight"].items() if step >= 200]
        assert len(settled) >= 9
        assert all(abs(value - expected) < 0.02 for value in settled), (key, settled)


def test_noise_is_given_as_a_bound(tmp_path: Path) -> None:
    found = train(tmp_path, watching(quiet()), Known({"none": 0.0, "clear": 0.5}))
    of_noise = found["signal_fraction_at_most/none.weight"]
    assert len(of_noise) >= 28
    assert of_noise[STEPS - 1] < 0.02
    assert all(step < 30 for step in found.get("signal_fraction/none.weight", {}))
    least = found["noise_scale_at_least/none.weight"]
    assert least[STEPS - 1] == pytest.approx(BATCH * (1 / of_noise[STEPS - 1] - 1), rel=1e-4)
    assert "signal_fraction/max" in found
    assert "signal_fraction_at_most/min" in found
    assert "signal_fraction_at_most/median" in found  # the mean of a bound and a value


class Swinging(Known):
    """A signal that changes its sign at every step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (-1) ** batch_idx


def test_a_signal_that_swings_is_no_bound_and_no_noise_scale(tmp_path: Path) -> None:
    callback = watching(quiet())
    found = train(tmp_path, callback, Swinging({"a": 0.5, "b": 0.6}))
    assert found["signal_fraction_negative/a.weight"][STEPS - 1] < 0
    noise_scales = [step for tag in found if tag.startswith("noise_scale") for step in found[tag]]
    assert noise_scales  # until the averages have settled
    assert max(noise_scales) < 200
    words = callback.readings.summary()
    assert words is not None
    assert words.startswith("in 2 of 2 matrices the gradients of neighbouring steps oppose each other")


class Tokens(Known):
    """A batch that has token ids beside the gradients, as a dictionary."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["noise"], batch_idx)


class WithTokens(Noise):
    def __getitem__(self, index: int) -> Any:
        return {"noise": super().__getitem__(index), "input_ids": torch.zeros(100, dtype=torch.long)}


def test_samples_and_tokens_of_all_micro_batches_count(tmp_path: Path) -> None:
    callback = ReadingLog()
    module = Tokens()
    module.configure_optimizers = optimize_with(NAMO, lr=1e-3, heads="matrix").__get__(module)  # type: ignore[method-assign]
    data = DataLoader(WithTokens(BATCH * 180), BATCH)
    fit(callback, module, CSVLogger(tmp_path), data, accumulate_grad_batches=3, log_every_n_steps=5, max_steps=60)
    assert (callback._batch, callback._batch_tokens) == (3 * BATCH, 3 * BATCH * 100)
    words = callback.summary()
    assert words is not None
    assert " of a gradient persists (median of 3 matrices); if the rest is noise, its scale is " in words
    assert f"tokens) beside a batch of {3 * BATCH} ({3 * BATCH * 100:,} tokens)" in words
    # a third of the noise is left
    high = callback._signals["high.weight"].estimate()
    assert high is not None
    assert high.rho == pytest.approx(0.8 / (0.8 + 0.2 / 3), abs=0.03)


@pytest.mark.parametrize(
    ("matrices", "aggregates", "most", "tags"),
    [
        (None, True, 64, {"high.weight", "low.weight", "middle.weight", "median", "min", "max"}),
        (None, True, 2, {"median", "min", "max"}),
        (True, False, 2, {"high.weight", "low.weight", "middle.weight"}),
        (False, True, 64, {"median", "min", "max"}),
        (False, False, 64, set()),
    ],
)
def test_single_matrices_and_aggregates_can_be_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrices: bool | None, aggregates: bool, most: int, tags: set[str]
) -> None:
    monkeypatch.setattr("lightning_namo.telemetry.reading_log.MOST_MATRICES", most)
    callback = watching(quiet(), log_matrices=matrices, log_aggregates=aggregates)
    found = train(tmp_path, callback, Known(), steps=20)
    assert {tag.partition("/")[2] for tag in found if tag.startswith("step_scale/")} == tags


def test_what_rules_report_is_logged_by_its_name(tmp_path: Path) -> None:
    found = train(tmp_path / "namod", watching(quiet(NAMOD)), Known(), steps=20)
    names = {tag.partition("/")[0] for tag in found} - {"epoch", "hp_metric"}
    of_columns = {
        f"{name}{of}" for name in ("step_scale", "effective_step", "effective_decay") for of in ("", "_min", "_max")
    }
    assert names >= of_columns | {"at_lower_clamp", "at_upper_clamp", "at_cap", "skipped_steps"}
    assert all(found["step_scale_min/low.weight"][s] <= v for s, v in found["step_scale/low.weight"].items())
    of_muon = train(tmp_path / "muon", watching(quiet(Muon)), Known(), steps=20)
    assert {tag.partition("/")[0] for tag in of_muon} >= {"effective_step", "effective_decay", "skipped_steps"}
    assert of_muon["effective_step/low.weight"][9] == pytest.approx(1e-3 * 0.2 * math.sqrt(32))
    assert of_muon["effective_decay/low.weight"][9] == pytest.approx(1e-3 * 0.1)


def test_a_short_last_batch_is_not_the_batch(tmp_path: Path) -> None:
    callback = watching(quiet())
    data = DataLoader(Noise(BATCH * 80 + 1), BATCH)
    keys = {"accumulate_grad_batches": 2, "log_every_n_steps": 7, "max_epochs": 1}
    trainer = fit(callback, Known(), CSVLogger(tmp_path), data, **keys)
    assert trainer.global_step == 41  # the last one on a single sample
    assert callback.readings._batch == 2 * BATCH
    words = callback.readings.summary()
    assert words is not None
    assert f"beside a batch of {2 * BATCH}: " in words


def test_batches_of_unlike_tensors_have_no_size_until_it_is_said(tmp_path: Path) -> None:
    class Unlike(Noise):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index), torch.zeros(3)

    class Two(Known):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    def collate(samples: list[Any]) -> Any:
        return torch.stack([noise for noise, _ in samples]), torch.zeros(3)

    def logged(folder: Path, log: ReadingLog) -> dict[str, dict[int, float]]:
        module = Two()
        module.configure_optimizers = optimize_with(NAMO, lr=1e-3, heads="matrix").__get__(module)  # type: ignore[method-assign]
        data = DataLoader(Unlike(BATCH * 100), BATCH, collate_fn=collate)
        fit(log, module, TensorBoardLogger(folder, name="", version=""), data, log_every_n_steps=10, max_steps=100)
        return curves(folder)

    with pytest.warns(UserWarning, match=r"The noise scale is not logged, .* not of one length: \[3, 8\]"):
        found = logged(tmp_path / "guessed", ReadingLog())
    assert "signal_fraction/high.weight" in found
    assert not any("noise_scale" in tag for tag in found)
    found = logged(tmp_path / "said", ReadingLog(batch_size_fn=lambda batch: len(batch[0])))
    rho = found["signal_fraction/high.weight"][99]
    assert found["noise_scale/high.weight"][99] == pytest.approx(BATCH * (1 - rho) / rho, rel=1e-4)


class ByHand(pl.LightningModule):
    """Two optimizers over layers of one name, stepped after every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Known({"layer": 0.8}), Known({"layer": 0.3})

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for module, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            self.manual_backward(module.training_step(batch, batch_idx) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [build_optimizer(module, NAMO, lr=1e-3) for module in (self.first, self.second)]


def test_two_optimizers_by_hand_are_told_apart(tmp_path: Path) -> None:
    found = train(tmp_path, ReadingLog(), ByHand(), steps=400, log_every_n_steps=50)
    for number, rho in enumerate((0.8, 0.3)):
        of_optimizer = found[f"signal_fraction/optimizer_{number}/layer.weight"]
        assert len(of_optimizer) == 8  # 400 steps of both are 400 batches
        expected = rho / (rho + (1 - rho) / 2)  # of two batches
        assert max(of_optimizer) > 150
        assert of_optimizer[max(of_optimizer)] == pytest.approx(expected, abs=0.03)
        scale = found[f"noise_scale/optimizer_{number}/layer.weight"][max(of_optimizer)]
        assert scale == pytest.approx(2 * BATCH * (1 - expected) / expected, rel=0.2)


def test_a_second_fit_knows_nothing_of_the_first(tmp_path: Path) -> None:
    callback = watching(quiet())
    train(tmp_path / "first", callback, Known(), steps=40)
    train(tmp_path / "second", callback, Known({"other": 0.5}), steps=40)
    assert set(callback.readings._signals) == {"other.weight"}


def test_readings_are_logged_once(tmp_path: Path) -> None:
    """A step that is not taken, as of AMP after an overflow, has none, rather than those of the step before."""
    callback, module = watching(quiet()), Known()
    train(tmp_path, callback, module, steps=20)
    assert "step_scale/low.weight" in curves(tmp_path)
    (optimizer,) = module.trainer.optimizers
    assert callback.readings._read(optimizer, "") == {}


class Spoiled(Known):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 9 else loss


def test_a_skipped_step_is_counted_and_reads_nothing_else(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="updates of matrices"):
        found = train(tmp_path, watching(quiet()), Spoiled(), steps=20)
    assert found["skipped_steps/low.weight"] == {9: 1.0, 19: 1.0}
    assert set(found["step_scale/low.weight"]) == {19}


def test_the_optimizer_keeps_readings_for_the_steps_that_are_logged_only(tmp_path: Path) -> None:
    kept: list[bool] = []

    class Watched(OptimizerCallback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            kept.append(trainer.optimizers[0].keeps_readings)  # type: ignore[attr-defined]
            super().on_train_batch_end(trainer, *args)

    train(tmp_path, Watched(quiet()), Known(), steps=20)
    assert kept == ([False] * 9 + [True]) * 2


def test_the_summary_names_what_stands_apart_and_says_what_to_do() -> None:
    def summary(rhos: list[float], batch: int) -> str:
        log = ReadingLog()
        log._sizes.append((batch, 0))
        for i, rho in enumerate(rhos):
            log._signals[f"m{i}"] = signal = SignalFraction(Averages(0.95, True, 0.99))
            for step in range(200, 400, 10):
                signal.add(step, rho)
        words = log.summary()
        assert words is not None
        return words

    assert summary([0.5, 0.55, 0.6, 0.05], 8) == (
        "52.5% of a gradient persists (median of 4 matrices); if the rest is noise, its scale is 7 samples beside a "
        "batch of 8: they are of one size; noisier by more than 4 times: m3 (5.0%)"
    )
    assert summary([0.9, 0.9, 0.99], 8).endswith("smaller batches would do; clearer by more than 4 times: m2 (99.0%)")
    assert "measure it (GradientNoiseScale) before you enlarge the batch" in summary([0.05, 0.05], 8)
    low = summary([0.0, 0.5, 0.5, 0.0, 0.5], 8)
    assert "noisier by more than 4 times: m0 (at most " in low or "noisier by more than 4 times: m3 (at most " in low
    assert "cannot be told yet" in summary([0.0, 0.4], 8)


def test_medians_of_bounds() -> None:
    assert median([(1.0, "value"), (2.0, "at_most"), (3.0, "value")]) == (2.0, "at_most")
    assert median([(1.0, "at_most"), (2.0, "value"), (3.0, "value")]) == (2.0, "value")
    assert median([(1.0, "value"), (2.0, "at_least")]) == (1.5, "at_least")
    assert median([(-1.0, "negative"), (2.0, "value")]) == (1.0, "at_most")
    assert median([(-1.0, "negative"), (0.5, "at_most")]) == (0.25, "at_most")
    assert median([(-2.0, "negative"), (-1.0, "negative")]) == (-1.5, "negative")
