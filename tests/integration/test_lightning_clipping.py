"""Gradient clipping in real runs, through the callback and through the mixin."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_namo import ClipsGradients, GradientClipping, gradient_norm
from tests.helpers.clipping import BOUND, bits
from tests.helpers.toy import BATCHES, Net, assert_same, fit

CLIP = {"norm": 0.2, "value": 0.01}  # below the norm and the larger elements of every gradient of the toy


class MomentumNet(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Clipped(ClipsGradients, MomentumNet):
    pass


class NormRecorder(pl.Callback):
    """The norm by torch before clipping, and what was logged, step by step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.logged: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.norms) > len(self.logged) and "grad_norm" in trainer.callback_metrics:
            self.logged.append(trainer.callback_metrics["grad_norm"].item())


def run(way: str, algorithm: str, recorder: NormRecorder, **options: object) -> pl.LightningModule:
    """Fit the toy with Lightning's clipping, or with ours."""
    if way == "callback":
        module, callbacks = MomentumNet(), [recorder, GradientClipping(**{BOUND[algorithm]: CLIP[algorithm]})]
    else:
        module, callbacks = Clipped() if way == "mixin" else MomentumNet(), [recorder]
        options |= {"gradient_clip_val": CLIP[algorithm], "gradient_clip_algorithm": algorithm}
    fit(module, *callbacks, **options)
    return module


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("algorithm", CLIP)
def test_both_ways_train_as_lightning_clips_and_log_the_norm(algorithm: str, options: dict[str, object]) -> None:
    expected = run("lightning", algorithm, reference := NormRecorder(), **options)
    for way in ("callback", "mixin"):
        module = run(way, algorithm, recorder := NormRecorder(), **options)
        torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
        assert recorder.logged == pytest.approx(recorder.norms, rel=1e-6)
        assert recorder.norms == pytest.approx(reference.norms, rel=1e-6 if "precision" not in options else 1e-3)
        assert len(recorder.logged) == 2 * BATCHES // options.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize("algorithm", CLIP)
def test_the_toy_trains_differently_without_clipping(algorithm: str) -> None:
    fit(unclipped := MomentumNet())
    clipped = run("lightning", algorithm, recorder := NormRecorder())
    assert min(recorder.norms) > CLIP["norm"]
    assert not torch.allclose(unclipped.head.weight, clipped.head.weight, rtol=0.1)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_the_norm_is_logged_at_lightnings_interval(tmp_path: Path, way: str) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    run(way, "norm", recorder := NormRecorder(), logger=logger, log_every_n_steps=4)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = {int(row[header.index("step")]): float(row[header.index("grad_norm")]) for row in rows}
    assert logged == {step: pytest.approx(recorder.norms[step]) for step in (3, 7, 11)}


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_gradients_are_unscaled_before_they_are_clipped(way: str) -> None:
    expected = run("lightning", "norm", reference := NormRecorder(), precision="bf16-mixed")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    module = run(way, "norm", recorder := NormRecorder(), plugins=[plugin])
    assert plugin.scaler.get_scale() == 2.0**10, "no step was skipped"
    torch.testing.assert_close(recorder.logged, reference.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_an_optimizer_that_unscales_by_itself_is_refused(way: str) -> None:
    class Fused(ClipsGradients, Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), fused=True)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    callbacks = [GradientClipping(max_norm=1.0)] if way == "callback" else []
    options = {} if callbacks else {"gradient_clip_val": 1.0}
    with pytest.raises(RuntimeError, match=r"Expected unscaled gradients to clip, but AdamW.*fused=False"):
        fit(Fused(), *callbacks, plugins=[plugin], **options)


def test_the_callback_serves_manual_optimization_and_each_optimizer_alone() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.seen: list[list[float]] = []

        def configure_optimizers(self):
            parts = (self.backbone, self.head)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts], []

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
            self.seen.append([gradient_norm(self.backbone).item(), gradient_norm(self.head).item()])
            for optimizer in self.optimizers():
                optimizer.zero_grad()

    fit(module := Manual(), GradientClipping(max_norm=0.05))
    assert module.seen == [[pytest.approx(0.05, rel=1e-4)] * 2] * 2 * BATCHES


def test_the_callback_refuses_to_clip_twice() -> None:
    with pytest.raises(ValueError, match=r"clipped once.*GradientClipping and Trainer\(gradient_clip_val=0\.5\)"):
        fit(Clipped(), GradientClipping(max_norm=1.0), gradient_clip_val=0.5)


@pytest.mark.parametrize("clip_val", [None, 0, 0.0])
def test_the_mixin_does_nothing_without_a_bound(clip_val: float | None) -> None:
    fit(plain := MomentumNet())
    fitted = fit(module := Clipped(), gradient_clip_val=clip_val)
    assert_same(module, plain)
    assert "grad_norm" not in fitted.callback_metrics


def test_the_mixin_refuses_a_negative_bound() -> None:
    with pytest.raises(ValueError, match="Trainer: expected gradient_clip_val to be a number > 0 but got -1"):
        fit(Clipped(), gradient_clip_val=-1)


def test_the_callback_comes_from_yaml_with_its_range(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = """
    trainer:
      max_epochs: 1
      accelerator: cpu
      devices: 1
      logger: false
      enable_checkpointing: false
      enable_progress_bar: false
      enable_model_summary: false
      limit_val_batches: 0
      callbacks:
        - class_path: lightning_namo.GradientClipping
          init_args: {KEY: VALUE}
    """

    def cli(key: str, value: str) -> LightningCLI:
        Path("config.yaml").write_text(config.replace("KEY", key).replace("VALUE", value))
        return LightningCLI(MomentumNet, args=["fit", "--config", "config.yaml"], save_config_callback=None)

    module = cli("clip_value", "0.01").model
    fit(expected := MomentumNet(), max_epochs=1, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert_same(module, expected)
    with pytest.raises(ValueError, match=r"GradientClipping: expected max_norm to be a number > 0 but got -1\.0"):
        cli("max_norm", "-1.0")


class Poisoning(MomentumNet):
    """Its gradients get an element that is not finite; what the optimizer finds is kept."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.value = value
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_after_backward(self) -> None:
        if self.value is not None:
            self.head.weight.grad[0, 0] = self.value
        self.before = [p.grad.clone() for p in self.parameters()]

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after = [p.grad.clone() for p in self.parameters()]


class MeasuringByMixin(ClipsGradients, Poisoning):
    pass


@pytest.mark.parametrize("poison", [None, math.inf, math.nan])
@pytest.mark.parametrize("way", ["callback", "norm", "value"])
def test_the_callback_and_the_mixin_measure_without_a_change(way: str, poison: float | None) -> None:
    recorder = NormRecorder()
    if way == "callback":
        module, callbacks, options = Poisoning(poison), [GradientClipping(max_norm=math.inf)], {}
    else:
        module, callbacks = MeasuringByMixin(poison), []
        options = {"gradient_clip_val": math.inf, "gradient_clip_algorithm": way}
    fit(module, recorder, *callbacks, max_steps=1, log_every_n_steps=1, **options)
    assert_same(bits(module.after), bits(module.before))
    torch.testing.assert_close(recorder.logged, recorder.norms, rtol=1e-6, atol=0, equal_nan=True)
