"""Gradient clipping on one device: as torch does it, through the callback and through the mixin."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_namo import ClipsGradients, GradientClipping, clip_gradients, gradient_norm
from tests.helpers.toy import BATCHES, Net, assert_same, fit

CLIP = {"norm": 0.2, "value": 0.01}  # below the norm and the larger elements of every gradient of the toy
BOUND = {"norm": "max_norm", "value": "clip_value"}


class SgdNet(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Clipped(ClipsGradients, SgdNet):
    pass


class Recorder(pl.Callback):
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


def layer_with(*grads: Tensor | None) -> nn.ParameterList:
    """A module of parameters with these gradients; None: a matrix without one."""
    parameters = nn.ParameterList(torch.zeros(2, 2) if g is None else torch.zeros_like(g) for g in grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    return parameters


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((33, 7), (5,), (3, 4, 2))]


# --- the functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("bound", [0.1, 5.0, 1000.0, math.inf])
def test_clipping_by_norm_is_what_torch_does(dtype: torch.dtype, bound: float) -> None:
    ours, theirs = layer_with(*gradients(dtype)), layer_with(*gradients(dtype))
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
    torch.testing.assert_close(clip_gradients(ours, max_norm=bound), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=5e-7, atol=0)
    assert any(not torch.equal(p.grad, g) for p, g in zip(ours, gradients(dtype), strict=True)) == (bound < expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_by_value_gives_the_bits_that_torch_gives(dtype: torch.dtype) -> None:
    ours, theirs = layer_with(*gradients(dtype)), layer_with(*gradients(dtype))
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.3)
    norm = gradient_norm(ours)
    assert_same(clip_gradients(ours, clip_value=0.3), norm)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])
    assert norm > gradient_norm(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_gradients_of_16_bits_has_32(dtype: torch.dtype) -> None:
    module = layer_with(*gradients(dtype))
    exact = torch.cat([g.double().flatten() for g in gradients(dtype)]).norm()
    norm = clip_gradients(module, max_norm=1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(p.grad.dtype == dtype for p in module)
    assert gradient_norm(module).item() == pytest.approx(1.0, rel=2**-8)


def test_the_norm_of_a_large_matrix_is_accurate() -> None:
    """torch's own is 5e-4 off here on the CPU: it adds up in a chain, and sharding would change the sum."""
    large = torch.randn(8192, 2048, generator=torch.Generator().manual_seed(0))
    assert gradient_norm(layer_with(large)).item() == pytest.approx(large.double().norm().item(), rel=1e-6)


def test_gradients_of_several_dtypes_have_one_norm() -> None:
    mixed = [g.to(dtype) for g, dtype in zip(gradients(), (torch.bfloat16, torch.float32, torch.float64), strict=True)]
    exact = torch.cat([g.double().flatten() for g in mixed]).norm()
    module = layer_with(*mixed)
    assert clip_gradients(module, max_norm=0.5).item() == pytest.approx(exact.item(), rel=1e-6)
    assert gradient_norm(module).item() == pytest.approx(0.5, rel=2**-8)


def test_parameters_without_gradients_and_empty_ones_count_as_nothing() -> None:
    module = layer_with(None, torch.ones(2, 2), torch.zeros(0, 3), None)
    assert clip_gradients(module, max_norm=1.0).item() == 2.0
    assert module[0].grad is None
    assert gradient_norm(module).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("module", [nn.Identity(), layer_with(None), layer_with(torch.zeros(0))])
def test_no_gradient_at_all_has_norm_zero(module: nn.Module) -> None:
    assert clip_gradients(module, max_norm=1.0).item() == 0.0
    assert clip_gradients(module, clip_value=1.0).item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("algorithm", CLIP)
def test_gradients_that_are_not_finite_end_as_with_torch(algorithm: str, poison: float) -> None:
    grads = gradients()
    grads[1][2] = poison
    ours, theirs = layer_with(*grads), layer_with(*grads)
    norm = clip_gradients(ours, **{BOUND[algorithm]: 0.5})
    assert torch.equal(norm, torch.tensor(poison)) or (math.isnan(poison) and norm.isnan())
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    else:
        torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.5)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])


def test_only_the_parameters_asked_for_are_measured_and_clipped() -> None:
    module = layer_with(torch.ones(2, 2), torch.ones(3, 3))
    assert gradient_norm(module, [module[1]]).item() == 3.0
    assert clip_gradients(module, max_norm=1.0, parameters=iter([module[0]])).item() == 2.0
    assert torch.equal(module[1].grad, torch.ones(3, 3))


def test_a_sparse_gradient_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    module[1](torch.tensor([1, 1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"Expected a dense gradient but 1\.weight of Sequential has a torch\.sparse_coo one"
    ):
        clip_gradients(module, max_norm=1.0)


def test_clipping_reads_nothing_from_the_device() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)
    assert clip_gradients(module, max_norm=1.0).is_meta  # a meta tensor has no value to read
    assert clip_gradients(module, clip_value=1.0).is_meta


@pytest.mark.parametrize("make", [partial(clip_gradients, nn.Identity()), GradientClipping])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "expected exactly one of max_norm and clip_value but got none"),
        ({"max_norm": 1.0, "clip_value": 0.5}, "expected exactly one of max_norm and clip_value but got {'max_norm'"),
        ({"max_norm": 0.0}, r"expected max_norm to be a number > 0 but got 0\.0"),
        ({"max_norm": -1}, "expected max_norm to be a number > 0 but got -1"),
        ({"max_norm": math.nan}, "expected max_norm to be a number > 0 but got nan"),
        ({"clip_value": "1"}, "expected clip_value to be a number > 0 but got '1'"),
        ({"clip_value": True}, "expected clip_value to be a number > 0 but got True"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, bounds, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**bounds)


# --- the callback and the mixin, in real runs -------------------------------------------------------


def run(way: str, algorithm: str, recorder: Recorder, **options: object) -> pl.LightningModule:
    """Fit the toy with Lightning's clipping, or with ours."""
    if way == "callback":
        module, callbacks = SgdNet(), [recorder, GradientClipping(**{BOUND[algorithm]: CLIP[algorithm]})]
    else:
        module, callbacks = Clipped() if way == "mixin" else SgdNet(), [recorder]
        options |= {"gradient_clip_val": CLIP[algorithm], "gradient_clip_algorithm": algorithm}
    fit(module, *callbacks, **options)
    return module


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("algorithm", CLIP)
def test_both_ways_train_as_lightning_clips_and_log_the_norm(algorithm: str, options: dict[str, object]) -> None:
    expected = run("lightning", algorithm, reference := Recorder(), **options)
    for way in ("callback", "mixin"):
        module = run(way, algorithm, recorder := Recorder(), **options)
        torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)
        assert recorder.logged == pytest.approx(recorder.norms, rel=1e-6)
        assert recorder.norms == pytest.approx(reference.norms, rel=1e-6 if "precision" not in options else 1e-3)
        assert len(recorder.logged) == 2 * BATCHES // options.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize("algorithm", CLIP)
def test_the_toy_trains_differently_without_clipping(algorithm: str) -> None:
    fit(unclipped := SgdNet())
    clipped = run("lightning", algorithm, recorder := Recorder())
    assert min(recorder.norms) > CLIP["norm"]
    assert not torch.allclose(unclipped.head.weight, clipped.head.weight, rtol=0.1)


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_the_norm_is_logged_at_lightnings_interval(tmp_path: Path, way: str) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    run(way, "norm", recorder := Recorder(), logger=logger, log_every_n_steps=4)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    logged = {int(row[header.index("step")]): float(row[header.index("grad_norm")]) for row in rows}
    assert logged == {step: pytest.approx(recorder.norms[step]) for step in (3, 7, 11)}


@pytest.mark.parametrize("way", ["callback", "mixin"])
def test_gradients_are_unscaled_before_they_are_clipped(way: str) -> None:
    expected = run("lightning", "norm", reference := Recorder(), precision="bf16-mixed")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    module = run(way, "norm", recorder := Recorder(), plugins=[plugin])
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
    fit(plain := SgdNet())
    fitted = fit(module := Clipped(), gradient_clip_val=clip_val)
    assert_same(module, plain)
    assert "grad_norm" not in fitted.callback_metrics


def test_the_mixin_refuses_a_negative_bound() -> None:
    with pytest.raises(ValueError, match="Trainer: expected gradient_clip_val to be a number > 0 but got -1"):
        fit(Clipped(), gradient_clip_val=-1)


def test_the_callback_comes_from_yaml_with_its_range(tmp_path: Path, monkeypatch, capsys) -> None:
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
        return LightningCLI(SgdNet, args=["fit", "--config", "config.yaml"], save_config_callback=None)

    module = cli("clip_value", "0.01").model
    fit(expected := SgdNet(), max_epochs=1, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert_same(module, expected)
    with pytest.raises(SystemExit):
        cli("max_norm", "-1.0")
    assert "max_norm" in capsys.readouterr().err


# --- measuring changes nothing ----------------------------------------------------------------------


def poisoned(value: float | None) -> list[Tensor]:
    """Gradients, one element of which is replaced; None: none is."""
    grads = gradients()
    if value is not None:
        grads[1][2] = value
    return grads


def bits(grads: list[Tensor]) -> list[Tensor]:
    return [grad.view(torch.int32) for grad in grads]


@pytest.mark.parametrize("poison", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bound", BOUND.values())
def test_an_infinite_bound_measures_and_changes_no_bit(bound: str, poison: float | None) -> None:
    module = layer_with(*poisoned(poison))
    norm = clip_gradients(module, **{bound: math.inf})
    assert_same(norm, gradient_norm(module))
    assert norm.isfinite() == (poison is None)
    assert_same(bits([p.grad for p in module]), bits(poisoned(poison)))


class Poisoning(SgdNet):
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
    recorder = Recorder()
    if way == "callback":
        module, callbacks, options = Poisoning(poison), [GradientClipping(max_norm=math.inf)], {}
    else:
        module, callbacks = MeasuringByMixin(poison), []
        options = {"gradient_clip_val": math.inf, "gradient_clip_algorithm": way}
    fit(module, recorder, *callbacks, max_steps=1, log_every_n_steps=1, **options)
    assert_same(bits(module.after), bits(module.before))
    torch.testing.assert_close(recorder.logged, recorder.norms, rtol=1e-6, atol=0, equal_nan=True)
