"""State dicts on one device: round trips, what is refused, and going on from another optimizer's."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, OptimizerCallback, WarmupStableDecay, build_optimizer
from tests.helpers import toy
from tests.helpers.toy import assert_same

OPTIMIZERS = [NAMO, NAMOD, Muon, AdaMuon]
EXACT = {"orthogonalizer": "svd"}
all_optimizers = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


class Model(nn.Module):
    """Matrices and others take turns; one matrix is fused of three, one is stored transposed, one is frozen."""

    def __init__(self, rows: int = 4, columns: int = 5, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, columns)
        self.qkv = nn.Linear(columns, 3 * rows)
        self.frozen = nn.Linear(rows, 2).requires_grad_(not frozen)
        self.norm = nn.LayerNorm(3 * rows)
        self.conv = nn.ConvTranspose1d(rows, columns, 2)
        self.out = nn.Linear(rows, columns)


def build(model: nn.Module, cls: Any, **options: Any) -> torch.optim.Optimizer:
    exact = EXACT if cls in OPTIMIZERS else {}
    return build_optimizer(model, cls, blocks={"qkv.weight": 3}, **{"lr": 0.01, **exact, **options})


def step(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int, missing: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in missing or not parameter.requires_grad else grad.to(parameter.dtype)
    optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert_same(actual["state"], expected["state"])


# --- round trips -----------------------------------------------------------------------------------

names = ("embed.weight", "qkv.weight", "qkv.bias", "conv.weight", "out.weight", "out.bias")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(OPTIMIZERS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    momentum=st.floats(0.0, 0.97),
    weight_decay=st.floats(0.0, 0.5),
    nesterov=st.booleans(),
    missing=st.lists(st.sets(st.sampled_from(names)), min_size=4, max_size=4),
    saved_at=st.integers(0, 4),
    by_module=st.booleans(),
)
def test_a_round_trip_changes_nothing(
    cls, rows, columns, dtype, momentum, weight_decay, nesterov, missing, saved_at, by_module
):
    hyper = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    model = Model(rows, columns).to(dtype)
    optimizer = build(model, cls, **hyper)
    for seed, names in enumerate(missing[:saved_at]):
        step(optimizer, model, seed, tuple(names))
    if by_module:
        optimizer.consolidate_state_dict()
    saved = through_a_file(optimizer.state_dict())
    resumed_model = copy.deepcopy(model)
    resumed = build(resumed_model, cls, lr=0.5, adamw_lr=0.25)  # the checkpoint's hyper-parameters win
    resumed.load_state_dict(saved)
    assert_same(resumed, optimizer)
    statistics = torch.promote_types(dtype, torch.float32)
    matrices = [state for state in resumed.state.values() if "skipped" in state]
    assert all(state[key].dtype == statistics for state in matrices for key in ("step", "v", "skipped") if key in state)
    for seed, names in enumerate(missing, start=10):
        step(optimizer, model, seed, tuple(names))
        step(resumed, resumed_model, seed, tuple(names))
    assert_same(resumed_model, model)
    assert_same(resumed, optimizer)


@all_optimizers
def test_ids_are_positions_in_the_module_where_lightning_saves_and_by_groups_elsewhere(cls):
    model = Model()
    optimizer = build(model, cls)
    by_groups = optimizer.state_dict()
    optimizer.consolidate_state_dict()
    by_module = optimizer.state_dict()
    positions = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    for group in by_module["param_groups"]:
        assert group["params"] == [positions[name] for name in group["param_names"]]
    assert [i for g in by_groups["param_groups"] for i in g["params"]] == list(range(len(by_groups["state"])))
    assert_same(optimizer.state_dict()["state"], by_groups["state"])  # asked for once


@all_optimizers
def test_names_decide_not_the_order(cls):
    """The module's layers were put in another order since; parameters of one shape would change places."""

    class Chain(nn.Module):
        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                self.add_module(name, nn.Linear(3, 3))

    model, other = Chain("abc"), Chain("cab")
    other.load_state_dict(model.state_dict())
    optimizer, resumed = build_optimizer(model, cls, **EXACT), build_optimizer(other, cls, **EXACT)
    for seed, (m, o) in enumerate([(model, optimizer)] * 2):
        step(o, m, seed)
    resumed.load_state_dict(optimizer.state_dict())
    kept = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if p.dim() > 1}
    for name, parameter in other.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(resumed.state[parameter]["momentum_buffer"], kept[name])


# --- refusals --------------------------------------------------------------------------------------


def other_model() -> nn.Module:
    model = Model()
    model.head = nn.Linear(4, 4)
    return model


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another algorithm": (
        lambda: build(Model(), NAMO).state_dict(),
        r"a checkpoint of NAMOD, but it has algorithm='NAMO'",
    ),
    "AdamW": (
        lambda: trained(torch.optim.AdamW, Model()).state_dict(),
        r"state of qkv.weight to be momentum_buffer \(12, 5\).* has exp_avg \(12, 5\)",
    ),
    "another model": (lambda: build(other_model(), NAMOD).state_dict(), r"it has head.weight, head.bias besides"),
    "other parameters frozen": (
        lambda: build(Model(frozen=False), NAMOD).state_dict(),
        r"it has frozen.weight, frozen.bias besides",
    ),
    "another shape": (
        lambda: build(Model(rows=3), NAMOD).state_dict(),
        r"state of qkv.weight to be momentum_buffer \(12, 5\).*has momentum_buffer \(9, 5\)",
    ),
    "another routing": (
        lambda: build(Model(), NAMOD, adamw="out.weight").state_dict(),
        r"out.weight is in 'adamw' with 7 parameters there, and in 'matrices' with 1 here",
    ),
    "other blocks": (
        lambda: build_optimizer(Model(), NAMOD, blocks={"qkv.weight": [4, 8]}).state_dict(),
        r"with blocks=3 in group 'matrices_blocks_3', but it has blocks=\[4, 8\]",
    ),
    "no state dict of an optimizer": (lambda: Model().state_dict(), r"with 'state' and 'param_groups', but got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_words_and_nothing_is_changed(case):
    make, message = REFUSED[case]
    model = Model()
    optimizer = build(model, NAMOD)
    step(optimizer, model, 0)
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was loaded"):
        optimizer.load_state_dict(make())
    assert_same_state(optimizer.state_dict(), before)


@pytest.mark.parametrize("key", ["v", "momentum_buffer", "step"])
def test_an_incomplete_state_is_refused(key):
    optimizer = build(Model(), NAMOD)
    saved = through_a_file(optimizer.state_dict())
    [(group, position)] = [
        (g, g["param_names"].index("qkv.weight")) for g in saved["param_groups"] if "qkv.weight" in g["param_names"]
    ]
    del saved["state"][group["params"][position]][key]
    with pytest.raises(ValueError, match=r"Expected the state of qkv.weight to be .* incomplete.*Nothing was loaded"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="the checkpoint has none"):
        optimizer.load_state_dict({**saved, "state": {}})


def test_a_v_of_another_length_is_refused_where_nothing_cut_it():
    optimizer = build(Model(), NAMOD)
    saved = through_a_file(optimizer.state_dict())
    state, *_ = [state for state in saved["state"].values() if state.get("v", torch.zeros(())).shape == (4,)]
    state["v"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"v \(4,\) but the checkpoint has .*v \(3,\)"):
        optimizer.load_state_dict(saved)


# --- going on from another optimizer's -------------------------------------------------------------


def trained(cls: Any, model: nn.Module, steps: int = 5, **options: Any) -> torch.optim.Optimizer:
    optimizer = build(model, cls, **options)
    for seed in range(steps):
        step(optimizer, model, seed)
    return optimizer


SOURCES = [(torch.optim.AdamW, "exp_avg", 0.9), (Muon, "momentum_buffer", 0.95), (NAMO, "momentum_buffer", 0.95)]


@pytest.mark.parametrize(("source", "key", "decay"), SOURCES, ids=lambda s: getattr(s, "__name__", ""))
def test_the_momentum_of_another_optimizer_counts_as_the_gradient_of_a_first_step(source, key, decay):
    model = Model()
    saved = through_a_file(trained(source, model).state_dict())
    optimizer = build(model, NAMOD, lr=0.125, adopt_state=True)
    with pytest.warns(UserWarning, match=r"Taken over: the momentum of 3 matrices.*whole state of 6 AdamW .* none"):
        optimizer.load_state_dict(saved)
    theirs = build(Model(), source)
    theirs.load_state_dict(saved)
    ids = {n: i for g in saved["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    for name, parameter in model.named_parameters():
        state, before = optimizer.state.get(parameter), saved["state"].get(ids.get(name))
        if name in ("qkv.weight", "conv.weight", "out.weight"):
            first_gradient = before[key] / (1 - decay**5)
            torch.testing.assert_close(state["momentum_buffer"], 0.05 * first_gradient)
            assert state["step"] == 1
            total = state["v"].sum() / 0.01
            torch.testing.assert_close(total, first_gradient.square().sum(), rtol=1e-5, atol=0)
        elif state is not None:
            assert_same(state, before)
    assert all(group["lr"] == 0.125 for group in optimizer.param_groups)
    weights = copy.deepcopy(model.state_dict())
    step(optimizer, model, 9)
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, weights[n])
        for n, p in model.named_parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("cls", [Muon, AdaMuon])
def test_optimizers_without_bias_correction_take_the_momentum_as_it_is(cls):
    model = Model()
    source = trained(torch.optim.AdamW, model)
    optimizer = build(model, cls, adopt_state=True)
    with pytest.warns(UserWarning, match="Taken over"):
        optimizer.load_state_dict(source.state_dict())
    expected = source.state[model.out.weight]["exp_avg"] / (1 - 0.9**5)
    torch.testing.assert_close(optimizer.state[model.out.weight]["momentum_buffer"], expected)


def test_a_plain_adamw_without_names_is_read_in_the_order_of_the_module():
    model = Model()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    step(plain, model, 0)
    optimizer = build(model, NAMO, adopt_state=True)
    with pytest.warns(UserWarning, match="the momentum of 3 matrices"):
        optimizer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        optimizer.state[model.out.weight]["momentum_buffer"], 0.05 * model.out.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_what_has_no_momentum_starts_anew_and_is_named():
    model = Model()
    saved = trained(torch.optim.SGD, model).state_dict()
    optimizer = build(model, NAMO, adopt_state=True)
    with pytest.warns(UserWarning, match=r"momentum of 0 matrices.*state of 0 AdamW.*anew: .*qkv.weight.* 4 more"):
        optimizer.load_state_dict(saved)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


def test_another_model_is_refused_even_then():
    optimizer = build(Model(), NAMO, adopt_state=True)
    for saved in (build(other_model(), torch.optim.AdamW).state_dict(), build(Model(3), Muon).state_dict()):
        with pytest.raises(ValueError, match="another model"):
            optimizer.load_state_dict(saved)


def test_a_checkpoint_of_its_own_loads_as_ever_with_adopt_state():
    model = Model()
    saved = through_a_file(trained(NAMO, model).state_dict())
    optimizer = build(model, NAMO, adopt_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), saved)


def test_only_our_optimizers_adopt():
    with pytest.raises(ValueError, match=r"adopt_state=True with NAMO, NAMOD, Muon or AdaMuon\. Got AdamW"):
        build(Model(), torch.optim.AdamW, adopt_state=True)


def test_a_run_of_adamw_goes_on_with_namo_at_namos_learning_rate(tmp_path):
    schedule = WarmupStableDecay(warmup=2)
    adamw = OptimizerCallback(functools.partial(torch.optim.AdamW, lr=0.3), schedule=schedule)
    saver = toy.checkpoints(tmp_path)
    toy.fit(toy.Net(), adamw, saver, enable_checkpointing=True, max_epochs=1)
    callback = OptimizerCallback(functools.partial(NAMO, lr=0.01, **EXACT), schedule=schedule, adopt_state=True)
    trainer, module = toy.trainer(callback, max_epochs=2), toy.Net()
    with pytest.warns(UserWarning, match="NAMO goes on from another optimizer's checkpoint"):
        trainer.fit(module, ckpt_path=saver.best_model_path or str(next(tmp_path.glob("*.ckpt"))))
    assert trainer.global_step == 2 * toy.BATCHES
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.01]
    refused = toy.trainer(OptimizerCallback(functools.partial(NAMO, lr=0.01)), max_epochs=2)
    with pytest.raises(ValueError, match="pass adopt_state=True"):
        refused.fit(toy.Net(), ckpt_path=str(next(tmp_path.glob("*.ckpt"))))
