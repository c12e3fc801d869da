"""What `SpectralMonitor` writes, read back from the loggers' files."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_namo import (
    NAMO,
    AdaMuon,
    Muon,
    OrthogonalizedOptimizer,
    SpectralMonitor,
    build_optimizer,
    optimize_with,
)
from lightning_namo.optim import Polar
from lightning_namo.telemetry.spectral_probe import SpectralProbe
from lightning_namo.testing.layouts import Experts
from tests.helpers.launch import run_ranks
from tests.helpers.matrices import matrix

STEPS = 25
SPECTRA = {"flat": torch.full((12,), 2.0), "steep": torch.logspace(0, -4, 12), "none": torch.zeros(12)}


class KnownSpectra(pl.LightningModule):
    """Gradients of known singular values, in directions that are drawn anew at each step."""

    def __init__(self, optimizer: Any = NAMO, nan_in: int | None = None, **keys: Any) -> None:
        super().__init__()
        for name in SPECTRA:
            self.register_module(name, nn.Linear(16, 12, bias=False))
        self.configure_optimizers = optimize_with(  # type: ignore[method-assign]
            optimizer, lr=1e-3, heads="matrix", first_layers="matrix", **keys
        ).__get__(self)
        self.nan_in, self.gradients = nan_in, {name: [] for name in SPECTRA}  # type: ignore[var-annotated]

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in self.children():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = []
        for place, (name, values) in enumerate(SPECTRA.items()):
            gradient = matrix(12, 16, values.double(), seed=100 * batch_idx + place)
            if name == "flat" and batch_idx == self.nan_in:
                gradient = gradient * math.nan
            self.gradients[name].append(gradient.double().numpy())
            layer = getattr(self, name)  # W against the gradient, through the layer: FSDP2 gathers what it is called on
            losses.append((layer(torch.eye(16)) * gradient.T).sum())
        return torch.stack(losses).sum()


def fit(
    module: pl.LightningModule, logger: Any, *callbacks: pl.Callback, steps: int = STEPS, **keys: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        max_steps=steps,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **keys,
    )
    trainer.fit(module, DataLoader(torch.zeros(steps, 1), 1))
    return trainer


def curves(folder: Path) -> tuple[dict[str, dict[int, float]], EventAccumulator]:
    """By tag and step, and all that TensorBoard's files have."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    return {t: {e.step: e.value for e in events.Scalars(t)} for t in events.Tags()["scalars"]}, events


def scalars(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **keys: Any) -> Any:
    fit(module, TensorBoardLogger(folder, name="", version=""), *callbacks, **keys)
    return curves(folder)


def test_readings_are_those_of_the_logged_step_with_the_next_gradient(tmp_path: Path) -> None:
    module = KnownSpectra()
    found, events = scalars(tmp_path, module, SpectralMonitor(every_n_steps=10, rank=3))
    assert set(found["sigma_gradient_q50/flat.weight"]) == {9, 19}  # as Lightning's log interval counts
    assert set(found["subspace_change_left/steep.weight"]) == {19}
    for step in (9, 19):
        at = {tag: of_steps[step] for tag, of_steps in found.items() if step in of_steps}
        assert at["sigma_gradient_q0/flat.weight"] == pytest.approx(2.0, rel=1e-5)
        assert at["sigma_gradient_q100/flat.weight"] == pytest.approx(2.0, rel=1e-5)
        assert at["stable_rank_gradient/flat.weight"] == pytest.approx(12, rel=1e-5)
        assert at["spectral_gap_gradient/flat.weight"] == pytest.approx(0, abs=1e-5)
        assert at["unlifted_share_gradient/steep.weight"] == pytest.approx(5 / 12)  # below 0.003 * 1.09
        assert "sigma_gradient_q50/none.weight" not in at  # all zeros: nothing can be said
        gradients = module.gradients["steep"]
        momentum = sum(0.05 * 0.95 ** (step - i) * gradients[i] for i in range(step + 1))
        values = np.linalg.svd(momentum, compute_uv=False)
        assert at["sigma_momentum_q100/steep.weight"] == pytest.approx(values[0], rel=1e-4)
        assert at["filter_ratio_top/steep.weight"] == pytest.approx(values[0] / float(SPECTRA["steep"][0]), rel=1e-4)
        U, _, Vh = np.linalg.svd(momentum, full_matrices=False)
        aligned = (U @ Vh * gradients[step + 1]).sum() / float(SPECTRA["steep"].sum())
        assert at["alignment_momentum/steep.weight"] == pytest.approx(aligned, abs=1e-5)
        assert 0.05 < at["orthogonality_error/flat.weight"] < 0.5  # the quintic's
        of_both = [at[f"sigma_momentum_q100/{name}.weight"] for name in ("flat", "steep")]
        assert at["sigma_momentum_q100/median"] == pytest.approx(sum(of_both) / 2, rel=1e-5)
        assert (at["sigma_momentum_q100/min"], at["sigma_momentum_q100/max"]) == (min(of_both), max(of_both))
    histogram = events.Histograms("spectrum_gradient/steep.weight")[0]
    assert histogram.step == 9
    assert histogram.histogram_value.num == 12
    assert histogram.histogram_value.min == pytest.approx(-4 - math.log10(1.087), abs=0.01)
    assert "spectrum_gradient/none.weight" not in events.Tags()["histograms"]


def under_fsdp2(rank: int, folder: str) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    keys = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    scalars(Path(folder), KnownSpectra(nan_in=19), SpectralMonitor(every_n_steps=10, rank=3), **keys)


def test_the_same_is_logged_under_fsdp2(tmp_path: Path) -> None:
    run_ranks(under_fsdp2, 2, str(tmp_path / "fsdp2"))
    found, events = curves(tmp_path / "fsdp2")
    expected, _ = scalars(tmp_path / "alone", KnownSpectra(nan_in=19), SpectralMonitor(every_n_steps=10, rank=3))
    assert found.keys() == expected.keys()
    spectra = [
        tag for tag in expected if tag.startswith(("sigma", "alignment", "stable", "subspace", "filter", "ortho"))
    ]
    assert len(spectra) > 60
    for tag in spectra:
        assert found[tag] == pytest.approx(expected[tag], rel=1e-3, abs=1e-5), tag
    assert len(events.Tags()["histograms"]) == 4


def test_the_last_step_is_read_without_an_alignment(tmp_path: Path) -> None:
    found, _ = scalars(tmp_path, KnownSpectra(), SpectralMonitor(every_n_steps=10), steps=20)
    assert set(found["sigma_momentum_q50/flat.weight"]) == {9, 19}
    assert set(found["alignment_momentum/flat.weight"]) == {9}


@pytest.mark.parametrize(("nan_in", "lost"), [(9, {"sigma_gradient", "orthogonality_error"}), (10, {"alignment"})])
def test_a_nan_gradient_costs_what_it_is_in(tmp_path: Path, nan_in: int, lost: set[str]) -> None:
    found, _ = scalars(tmp_path, KnownSpectra(nan_in=nan_in), SpectralMonitor(every_n_steps=10))
    tags = {f"{name}/flat.weight" for name in ("sigma_gradient_q50", "alignment_momentum", "orthogonality_error")}
    tags |= {"sigma_momentum_q50/flat.weight", "alignment_gradient/flat.weight"}
    gone = {tag for tag in tags if 9 not in found[tag]}
    if nan_in == 9:
        lost = lost | {"alignment_gradient"}  # of the polar factor of a gradient that is none
    assert gone == {tag for tag in tags if any(tag.startswith(name) for name in lost)}
    assert all(19 in found[tag] for tag in tags)
    assert all(math.isfinite(value) for of_steps in found.values() for value in of_steps.values())


def test_training_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    """To the bit, random numbers too."""
    weights = []
    for callbacks in ([], [SpectralMonitor(every_n_steps=3)]):
        torch.manual_seed(0)
        module = KnownSpectra(AdaMuon)
        fit(module, CSVLogger(tmp_path), *callbacks)
        weights.append([*module.state_dict().values(), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_csv_files_get_the_scalars(tmp_path: Path) -> None:
    fit(KnownSpectra(), CSVLogger(tmp_path, name="", version=""), SpectralMonitor(every_n_steps=10))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sigma_momentum_q50/flat.weight"]]
    assert [int(row["step"]) for row in rows] == [9, 19]
    assert all(float(row["stable_rank_gradient/flat.weight"]) == pytest.approx(12, rel=1e-5) for row in rows)


@pytest.mark.parametrize(
    ("parameters", "most", "tags"),
    [
        (None, 64, {"flat.weight", "steep.weight", "median", "min", "max"}),
        (None, 2, {"median", "min", "max"}),
        ("s*", 0, {"steep.weight", "median", "min", "max"}),
        (["flat.*", "s*"], 0, {"flat.weight", "steep.weight", "median", "min", "max"}),
    ],
)
def test_which_matrices_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: Any, most: int, tags: set[str]
) -> None:
    monkeypatch.setattr("lightning_namo.telemetry.spectral_monitor.MOST_MATRICES", most)
    found, events = scalars(tmp_path, KnownSpectra(), SpectralMonitor(every_n_steps=20, parameters=parameters))
    assert {tag.partition("/")[2] for tag in found if tag.startswith("sigma_momentum_q50/")} == tags
    histograms = {tag.partition("/")[2] for tag in events.Tags()["histograms"]}
    assert histograms == tags - {"median", "min", "max"}


@pytest.mark.parametrize(
    ("order", "alignment"),
    [("pre", "alignment_momentum"), ("none", None), ("post", "alignment_polar_average")],
)
def test_each_order_reads_what_it_keeps(tmp_path: Path, order: str, alignment: str | None) -> None:
    found, _ = scalars(tmp_path, KnownSpectra(Muon, order=order), SpectralMonitor(every_n_steps=10))
    names = {tag.partition("/")[0] for tag in found if tag.startswith("alignment")}
    assert names == {"alignment_gradient", alignment} - {None}
    if order == "post":
        assert found["sigma_momentum_q100/flat.weight"][9] <= 1.2  # of an average of polar factors


def test_what_it_took_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(KnownSpectra(), CSVLogger(tmp_path), SpectralMonitor(every_n_steps=10))
    (line,) = [message for message in caplog.messages if message.startswith("SpectralMonitor")]
    assert line.startswith("SpectralMonitor: 6 readings of a matrix took 0.")
    share = float(line.partition("s, ")[2].partition("%")[0])
    assert 0 < share < 100


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected every_n_steps to be a whole number >= 1 but got 0"):
        SpectralMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match=r"expected rank to be a whole number >= 1 but got 1\.5"):
        SpectralMonitor(rank=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected parameters to be globs, or None but got \[\]"):
        SpectralMonitor(parameters=[])


def test_a_glob_that_matches_nothing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = KnownSpectra()
    with pytest.raises(ValueError, match=r"Expected 'stepp\.\*' in SpectralMonitor's parameters.* Nearest: steep"):
        fit(module, CSVLogger(tmp_path), SpectralMonitor(parameters=["flat.*", "stepp.*"]))
    assert module.gradients["flat"] == []


def test_an_optimizer_without_matrices_is_warned_of(tmp_path: Path) -> None:
    module = KnownSpectra(torch.optim.AdamW)
    with pytest.warns(UserWarning, match="SpectralMonitor has nothing to do: no optimizer"):
        found, _ = scalars(tmp_path, module, SpectralMonitor(every_n_steps=10))
    assert not any(tag.startswith("sigma") for tag in found)


class Failing(KnownSpectra):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 11:
            raise KeyError("a bug of the user's")
        return super().training_step(batch, batch_idx)


def test_an_optimizer_is_left_alone_after_an_error(tmp_path: Path) -> None:
    module = Failing()
    with pytest.raises(KeyError):
        fit(module, CSVLogger(tmp_path), SpectralMonitor(every_n_steps=11))
    (optimizer,) = module.trainer.optimizers
    assert optimizer._watchers == []


class ByHand(KnownSpectra):
    """Two optimizers, of which the second steps after every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        keys = {"lr": 1e-3, "heads": "matrix", "first_layers": "matrix", "orthogonalizer": "svd"}
        return [build_optimizer(getattr(self, name), NAMO, **keys) for name in ("flat", "steep")]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer in [first, second] if batch_idx % 3 == 2 else [first]:
            optimizer.step()
            optimizer.zero_grad()


def by_hand() -> ByHand:
    module = ByHand()
    del module.configure_optimizers
    return module


@pytest.mark.parametrize("every", [1, 2, 10])
def test_each_of_two_optimizers_is_read_in_its_first_step_that_is_due(tmp_path: Path, every: int) -> None:
    found, _ = scalars(tmp_path, by_hand(), SpectralMonitor(every_n_steps=every))
    steps = {number: set(found[f"sigma_gradient_q100/optimizer_{number}/weight"]) for number in (0, 1)}
    batches = 19  # 25 steps of both
    assert steps[0] == {step for step in range(batches) if (step + 1) % every == 0}
    assert steps[1] == ({11} if every == 10 else set(range(2, batches, 3)))
    assert found["sigma_gradient_q100/optimizer_0/weight"][9] == pytest.approx(2.0, rel=1e-5)
    assert "sigma_gradient_q50/optimizer_1/median" in found


class Named(ByHand):
    def configure_optimizers(self) -> Any:
        return [NAMO([(name, getattr(self, name).weight)], lr=1e-3) for name in ("flat", "steep")]


def test_one_of_two_optimizers_may_be_read_alone(tmp_path: Path) -> None:
    module = Named()
    del module.configure_optimizers
    found, _ = scalars(tmp_path, module, SpectralMonitor(every_n_steps=10, parameters="flat"))
    names = {tag.partition("/")[2] for tag in found if "/optimizer" in tag}
    assert names == {f"optimizer_0/{of}" for of in ("flat", "median", "min", "max")}


def test_a_step_inside_of_autocast_is_measured_in_float64(tmp_path: Path) -> None:
    found, _ = scalars(tmp_path, by_hand(), SpectralMonitor(every_n_steps=10), precision="bf16-mixed")
    assert found["orthogonality_error/optimizer_0/weight"][9] < 1e-5


def test_two_monitors_read_side_by_side(tmp_path: Path) -> None:
    monitors = SpectralMonitor(every_n_steps=5, parameters="flat.*"), SpectralMonitor(every_n_steps=10, parameters="s*")
    found, _ = scalars(tmp_path, KnownSpectra(), *monitors)
    for tag in ("sigma_gradient_q50", "orthogonality_error", "alignment_momentum"):
        assert set(found[f"{tag}/flat.weight"]) == {4, 9, 14, 19} | ({24} - {24 if tag.startswith("align") else 0})
        assert set(found[f"{tag}/steep.weight"]) == {9, 19}


def test_clipped_values_are_what_alignment_is_with(tmp_path: Path) -> None:
    module = KnownSpectra()
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    found, _ = scalars(tmp_path, module, SpectralMonitor(every_n_steps=10), **clip)
    gradients = [gradient.clip(-0.05, 0.05) for gradient in module.gradients["steep"]]
    U, _, Vh = np.linalg.svd(gradients[9], full_matrices=False)
    expected = (U @ Vh * gradients[10]).sum() / np.linalg.svd(gradients[10], compute_uv=False).sum()
    assert found["alignment_gradient/steep.weight"][9] == pytest.approx(expected, abs=1e-5)


class Unfrozen(KnownSpectra):
    """A layer that is not trained at first, and whose parameter then comes to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.steep.requires_grad_(False)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 12:
            self.steep.requires_grad_(True)
            optimizer: Any = self.optimizers()
            optimizer.optimizer.add_param_group({"params": [("steep.weight", self.steep.weight)]})


def test_a_layer_that_is_unfrozen_is_read_from_then_on(tmp_path: Path) -> None:
    found, _ = scalars(tmp_path, Unfrozen(), SpectralMonitor(every_n_steps=10, parameters=["flat.*", "steep.*"]))
    assert set(found["sigma_gradient_q50/flat.weight"]) == {9, 19}
    assert set(found["sigma_gradient_q50/steep.weight"]) == {19}


def test_without_a_logger_nothing_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="nothing to do: the Trainer has no logger"):
        fit(KnownSpectra(), False, SpectralMonitor(every_n_steps=10))
    assert not [message for message in caplog.messages if message.startswith("SpectralMonitor")]


def test_a_fit_that_is_too_short_is_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(KnownSpectra(), CSVLogger(tmp_path), SpectralMonitor())
    assert "SpectralMonitor: no step was read, since 25 were taken and every 100 is." in caplog.messages


def test_a_resumed_fit_counts_on(tmp_path: Path) -> None:
    trainer = fit(KnownSpectra(), False, steps=7)
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    resumed = pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[SpectralMonitor(every_n_steps=5)],
        max_steps=16,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.zeros(STEPS, 1), 1)
    resumed.fit(KnownSpectra(), data, ckpt_path=tmp_path / "seven.ckpt", weights_only=True)
    assert set(curves(tmp_path)[0]["sigma_gradient_q50/flat.weight"]) == {9, 14}


def other_arguments(rank: int, folder: str) -> str:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with pytest.raises(ValueError, match="to have the same arguments on all ranks") as error:
        fit(KnownSpectra(), CSVLogger(folder), SpectralMonitor(rank=3 + rank), strategy=strategy, devices=2)
    return str(error.value)


def test_ranks_with_other_arguments_are_refused(tmp_path: Path) -> None:
    first, second = run_ranks(other_arguments, 2, str(tmp_path))
    assert first == second


def read_once(*parameters: Any, rank: int = 1, **keys: Any) -> dict[str, Any]:
    """What a probe reads of the first step of parameters whose gradients are there."""
    optimizer = NAMO(parameters, lr=1e-3, **keys)
    probe = SpectralProbe(optimizer, None, rank)
    probe.watch()
    optimizer.step()
    optimizer.step()
    taken = probe.take()
    assert taken is not None
    return {name: spectra.numbers() for name, spectra in taken[1].items()}


def parameter(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> nn.Parameter:
    found = nn.Parameter(torch.zeros(*shape, dtype=dtype))
    found.grad = torch.randn(*shape, dtype=dtype) * scale
    return found


def test_empty_parameters_and_those_of_one_name_are_told_apart() -> None:
    groups = [{"params": [("w", parameter(3, 4)), ("none", parameter(0, 4))]}, {"params": [("w", parameter(5, 6))]}]
    found = read_once(*groups)
    assert set(found) == {"w", "w_2"}
    assert found["w"]["sigma_gradient_q100"] != found["w_2"]["sigma_gradient_q100"]


def test_float64_is_read_in_float64() -> None:
    tiny = parameter(4, 6, dtype=torch.float64, scale=1e-60)
    found = read_once(("tiny", tiny), orthogonalizer="svd")["tiny"]
    assert tiny.grad is not None
    assert found["sigma_gradient_q100"] == pytest.approx(float(torch.linalg.matrix_norm(tiny.grad, 2)), rel=1e-6)
    assert found["orthogonality_error"] < 1e-6


class SignMomentum(OrthogonalizedOptimizer):
    """Orthogonalizes the average of the gradients' signs."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0})

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h, toward=x.grad.sign()))
        x.apply(O, h.lr)


def test_a_momentum_of_something_else_has_an_alignment_but_no_filter_ratio(tmp_path: Path) -> None:
    found, _ = scalars(tmp_path, KnownSpectra(SignMomentum), SpectralMonitor(every_n_steps=10))
    assert -1 <= found["alignment_momentum/flat.weight"][9] <= 1
    assert not any(tag.startswith(("filter_ratio", "alignment_polar")) for tag in found)


def test_what_turned_from_nothing_has_not_stayed() -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    optimizer = NAMO([("weight", weight)], lr=1e-3)
    probe, changes = SpectralProbe(optimizer, None, rank=2), []
    for step in range(6):
        weight.grad = torch.zeros(6, 8) if step < 2 else matrix(6, 8, torch.linspace(3, 1, 6).double())
        probe.watch(step)
        optimizer.step()
        if (taken := probe.take()) is not None:
            changes.append(taken[1]["weight"].numbers().get("subspace_change_left"))
    assert changes[:3] == [None] * 3  # of steps 0, 1 and 2: the momentum before was zero
    assert changes[3:] == pytest.approx([0, 0], abs=1e-6)


def test_eigenvalues_that_are_not_found_cost_a_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK is made to fail, as it does on no matrix that we know of."""
    real, calls = torch.linalg.eigh, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("it did not converge")  # type: ignore[attr-defined]
        return real(*args)

    monkeypatch.setattr("torch.linalg.eigh", failing)
    with pytest.warns(UserWarning, match="The spectra of [ab] are not known in this reading: it did not converge"):
        found = read_once(("a", parameter(3, 4)), ("b", parameter(5, 4)))
    assert sorted("sigma_gradient_q50" in numbers for numbers in found.values()) == [False, True]


def test_a_probe_whose_parameters_have_changed_reads_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = NAMO([("weight", weight)], lr=1e-3)
    probe = SpectralProbe(optimizer, None, rank=1)
    weight.grad = torch.randn(3, 4)
    probe.watch(1)
    optimizer.step()
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3, 3)))]})
    probe.watch(2)
    optimizer.step()
    assert probe.take() is None
    optimizer.step()
    taken = probe.take()
    assert taken is not None
    assert (taken[0], set(taken[1])) == (2, {"weight", "more"})
    assert "sigma_momentum_q50" not in taken[1]["more"].numbers()


def test_blocks_of_experts_are_named_one_expert_after_the_other_as_readings_are() -> None:
    module = Experts(3, 8, 5)
    optimizer = build_optimizer(module, NAMO, lr=1e-3, blocks={"weight": 2}, batched="weight")
    optimizer.keeps_readings = True
    probe = SpectralProbe(optimizer, None, rank=1)
    module.weight.grad = gradient = torch.randn(3, 8, 5)
    probe.watch()
    optimizer.step()
    expected = torch.linalg.matrix_norm(gradient.view(3, 2, 4, 5), 2).flatten().tolist()
    optimizer.zero_grad(set_to_none=False)  # in place
    probe.finish()
    taken = probe.take()
    assert taken is not None
    found = {name: spectra.numbers()["sigma_gradient_q100"] for name, spectra in taken[1].items()}
    assert found == pytest.approx({f"weight[{i}]": value for i, value in enumerate(expected)})
    assert optimizer.readings()["step_scale"]["weight"].shape == (6,)
