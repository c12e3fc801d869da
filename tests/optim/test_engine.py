"""What the four optimizers promise beside their formulas: closures, groups, state, gradients that are not finite."""

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from math import inf, nan

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, WarmupStableDecay, split_parameters
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.types import NonNegativeFloat
from tests.helpers.toy import assert_same

OPTIMIZERS = [NAMO, NAMOD, Muon, AdaMuon]
EXACT = {"orthogonalizer": "svd"}

all_optimizers = pytest.mark.parametrize("cls", OPTIMIZERS)
adaptive_optimizers = pytest.mark.parametrize("cls", [NAMO, NAMOD])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(randn(*shape, seed=seed, dtype=dtype))


def build(cls: type, dtype: torch.dtype = torch.float32, **hyper: object) -> OrthogonalizedOptimizer:
    """Two groups of matrices, one of them fused, and two of AdamW."""
    return cls(
        [
            {"params": [parameter(6, 4, seed=1, dtype=dtype), parameter(3, 5, seed=2, dtype=dtype)]},
            {"params": [parameter(6, 5, seed=3, dtype=dtype)], "blocks": [2, 4], "name": "fused"},
            {"params": [parameter(5, seed=4, dtype=dtype)], "orthogonalize": False, "name": "biases"},
            {"params": [parameter(7, 3, seed=5, dtype=dtype)], "orthogonalize": False, "eps": 1e-6},
        ],
        **hyper,
    )


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for index, p in enumerate(parameters(optimizer)):
        p.grad = randn(*p.shape, seed=100 * seed + index).to(p)


def run(optimizer: torch.optim.Optimizer, *seeds: int) -> torch.optim.Optimizer:
    for seed in seeds:
        set_gradients(optimizer, seed)
        optimizer.step()
    return optimizer


def snapshot(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """A parameter and its state, copied; the counter of skipped steps left out."""
    return copy.deepcopy({"weight": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k != "skipped"}})


def assert_same_run(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Equal weights and state, bit by bit."""
    assert_same([p.detach() for p in parameters(actual)], [p.detach() for p in parameters(expected)])
    assert_same(actual, expected)


def through_a_file(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the step and its closure ---------------------------------------------------------------------


def test_all_optimizers_share_the_only_step():
    steps = {inspect.unwrap(cls.step) for cls in [OrthogonalizedOptimizer, *OPTIMIZERS]}
    assert len(steps) == 1


@all_optimizers
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_the_closure_runs_with_gradients_and_its_loss_is_returned(cls, outer):
    x = randn(7, 4)

    def closure_of(optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (x @ parameters(optimizer)[0].T).square().mean()
        loss.backward()
        return loss

    with_closure, without = build(cls), build(cls)
    for _ in range(2):
        expected = closure_of(without)
        without.step()
        with outer():
            loss = with_closure.step(lambda: closure_of(with_closure))
        assert_same(loss, expected)
    assert_same_run(with_closure, without)


@all_optimizers
def test_a_step_without_closure_returns_none(cls):
    optimizer = build(cls)
    set_gradients(optimizer, 0)
    assert optimizer.step() is None


@all_optimizers
def test_gradients_are_not_touched(cls):
    optimizer = build(cls)
    set_gradients(optimizer, 0)
    before = [p.grad.clone() for p in parameters(optimizer)]
    optimizer.step()
    assert_same([p.grad for p in parameters(optimizer)], before)


CHANGES = {
    "lr": 0.03,
    "weight_decay": 0.7,
    "momentum": 0.5,
    "beta2": 0.999,
    "eps": 1.0,
    "nesterov": False,
    "clamp": 0.99,
    "ns_steps": 2,
    "ns_coefficients": "polar_express",
    "orthogonalizer": "svd",
    "shape_scale": None,
    "max_step": 1e-3,
    "decay": "lr",
}


@pytest.mark.parametrize(
    ("cls", "key"),
    [(cls, key) for cls in OPTIMIZERS for key in CHANGES if key in cls([parameter(2, 2)]).param_groups[0]],
)
def test_a_hyper_parameter_changed_between_steps_counts_from_the_next_step_on(cls, key):
    unchanged, changed = (run(cls([parameter(6, 4)]), 0, 1) for _ in range(2))
    assert changed.param_groups[0][key] != CHANGES[key]
    changed.param_groups[0][key] = CHANGES[key]
    (expected,), (actual,) = parameters(run(unchanged, 2)), parameters(run(changed, 2))
    assert not torch.equal(actual, expected)


@all_optimizers
def test_layouts_are_worked_out_once_and_again_when_groups_change(cls):
    class Counting(cls):
        count = 0

        def _layout(self, *args):
            self.count += 1
            return super()._layout(*args)

    optimizer = run(build(Counting), 0)
    planned = optimizer.count
    assert run(optimizer, 1, 2).count == planned
    optimizer.add_param_group({"params": [parameter(4, 4)]})
    assert run(optimizer, 3).count > planned + 2  # on being added, and planned anew with all the others


# --- parameters of every kind ---------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_follows_float64(cls, dtype, tolerance):
    start, gradients = (0.1 * randn(6, 4)).to(dtype), [randn(6, 4, seed=s, dtype=dtype) for s in range(1, 5)]
    weights = {}
    for kind in (dtype, torch.float64):
        p = nn.Parameter(start.to(kind, copy=True))
        optimizer = cls([p], lr=0.1, **EXACT)
        for grad in gradients:
            p.grad = grad.to(kind)
            optimizer.step()
        weights[kind] = p.detach()
    assert weights[dtype].dtype == dtype
    assert (weights[dtype] - weights[torch.float64]).norm() < tolerance * (weights[torch.float64] - start).norm()


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_float32_at_least(cls, dtype):
    for state in run(build(cls, dtype), 0, 1).state.values():
        kinds = {key: value.dtype for key, value in state.items()}
        assert kinds.pop("step") == (torch.float64 if dtype == torch.float64 and "skipped" in kinds else torch.float32)
        for key in ("skipped", "v"):
            assert kinds.pop(key, torch.promote_types(dtype, torch.float32)) == torch.promote_types(
                dtype, torch.float32
            )
        assert set(kinds.values()) == {dtype}


@all_optimizers
def test_one_optimizer_trains_parameters_of_several_dtypes(cls):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    together = run(cls([parameter(6, 4, dtype=dtype) for dtype in dtypes]), 0)
    for index, dtype in enumerate(dtypes):
        p = parameter(6, 4, dtype=dtype)
        alone = cls([p])
        p.grad = randn(6, 4, seed=index).to(dtype)
        alone.step()
        assert_same(parameters(together)[index], p)


@all_optimizers
def test_channels_last_convolutions_train_as_contiguous_ones_and_stay_channels_last(cls):
    plain, last = nn.Parameter(randn(6, 4, 3, 3)), nn.Parameter(randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizers = [cls([plain]), cls([last])]
    for seed in range(1, 4):
        plain.grad, last.grad = (randn(6, 4, 3, 3, seed=seed).contiguous(memory_format=f) for f in _FORMATS)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-6)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert optimizers[1].state[last]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


_FORMATS = (torch.contiguous_format, torch.channels_last)


@all_optimizers
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 2, 3), (6, 4, 2, 3, 2)])
def test_convolutions_train_as_the_matrices_they_flatten_to(cls, shape):
    kernel = nn.Parameter(randn(*shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    for optimizer in (run(cls([kernel]), 1, 2), run(cls([matrix]), 1, 2)):
        assert optimizer.skipped_steps() == 0
    assert_same(kernel.detach().flatten(1), matrix.detach())


@all_optimizers
def test_a_parameter_that_is_not_contiguous_trains_as_its_copy(cls):
    strided, copied = nn.Parameter(randn(4, 6).T), nn.Parameter(randn(4, 6).T.contiguous())
    optimizers = [cls([strided]), cls([copied])]
    for seed in range(1, 3):
        strided.grad = copied.grad = randn(6, 4, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(strided, copied, rtol=0, atol=1e-6)


def exact_run(cls: type, groups: list[dict], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Weights after some steps with the exact polar factor in float64; gradients by step and parameter."""
    optimizer = cls(groups, lr=0.1, **EXACT)
    for step in gradients:
        for p, grad in zip(parameters(optimizer), step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in parameters(optimizer)]


@all_optimizers
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_a_transposed_parameter_trains_as_its_transpose(cls, shape):
    start, gradients = (
        randn(*shape, dtype=torch.float64),
        [randn(*shape, seed=s, dtype=torch.float64) for s in (1, 2, 3)],
    )
    (expected,) = exact_run(cls, [{"params": [nn.Parameter(start.clone())]}], [[g] for g in gradients])
    stored = nn.Parameter(start.T.contiguous())
    (actual,) = exact_run(cls, [{"params": [stored], "transposed": True}], [[g.T.contiguous()] for g in gradients])
    torch.testing.assert_close(actual.T, expected, rtol=0, atol=1e-12)


def test_transposing_matters_to_namo_d_whose_statistics_are_by_column():
    start, gradients = randn(4, 7, dtype=torch.float64), [[randn(4, 7, seed=s, dtype=torch.float64)] for s in (1, 2, 3)]
    plain, transposed = (
        exact_run(NAMOD, [{"params": [nn.Parameter(start.clone())], "transposed": t}], gradients)[0]
        for t in (False, True)
    )
    assert (plain - transposed).abs().max() > 1e-3


@all_optimizers
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("blocks", "rows"), [(3, (4, 4, 4)), ([2, 5, 3], (2, 5, 3)), ((6, 1), (6, 1))])
def test_a_fused_parameter_trains_as_its_blocks_apart(cls, blocks, rows, transposed):
    start, *gradients = (randn(sum(rows), 5, seed=s, dtype=torch.float64) for s in range(4))
    expected = exact_run(
        cls,
        [{"params": [nn.Parameter(part.clone()) for part in start.split(rows)]}],
        [list(grad.split(rows)) for grad in gradients],
    )
    stored = [(t.T.contiguous() if transposed else t) for t in (start, *gradients)]
    group = {"params": [nn.Parameter(stored[0])], "blocks": blocks, "transposed": transposed}
    (actual,) = exact_run(cls, [group], [[grad] for grad in stored[1:]])
    torch.testing.assert_close(actual.T if transposed else actual, torch.cat(expected), rtol=0, atol=1e-12)


def test_fusing_matters():
    start, *gradients = (randn(12, 5, seed=s, dtype=torch.float64) for s in range(4))
    whole, fused = (
        exact_run(NAMO, [{"params": [nn.Parameter(start.clone())], "blocks": k}], [[g] for g in gradients])[0]
        for k in (1, 3)
    )
    assert (whole - fused).abs().max() > 1e-3


# --- AdamW ----------------------------------------------------------------------------------------


ADAMW = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_adamw_groups_run_torchs_adamw(cls, dtype):
    shapes = [(5,), (), (3, 4), (2, 3, 4)]
    ours, theirs = ([parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizer = cls(
        [{"params": [parameter(3, 3)]}, {"params": ours, "orthogonalize": False}],
        **{f"adamw_{key}": value for key, value in ADAMW.items()},
    )
    reference = torch.optim.AdamW(theirs, fused=dtype != torch.complex64, **ADAMW)
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=10 * step + index, dtype=dtype)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    exact = 0 if dtype != torch.complex64 else 1e-6  # ours is fused, in real numbers; torch's is not
    torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps", "betas"])
def test_an_adamw_group_takes_torchs_keys(key):
    ours, theirs = parameter(5), parameter(5)
    optimizer = NAMO(
        [{"params": [parameter(3, 3)]}, {"params": [ours], "orthogonalize": False, key: ADAMW[key]}], adamw_lr=0.1
    )
    defaults = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}
    reference = torch.optim.AdamW([theirs], fused=True, **defaults | {key: ADAMW[key]})
    for seed in (1, 2, 3):
        ours.grad = theirs.grad = randn(5, seed=seed)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)


@all_optimizers
def test_the_adamw_learning_rate_is_the_matrices_unless_given(cls):
    assert build(cls, lr=0.123).param_groups[2]["lr"] == 0.123
    assert build(cls, lr=0.123, adamw_lr=0.5).param_groups[2]["lr"] == 0.5


# --- state and groups -----------------------------------------------------------------------------


@all_optimizers
def test_state_is_complete_before_the_first_step(cls):
    fresh, stepped = build(cls), run(build(cls), 0)
    described = [
        {k: (v.shape, v.dtype) for k, v in o.state[p].items()} for o in (fresh, stepped) for p in parameters(o)
    ]
    assert len(fresh.state) == 5
    assert described[:5] == described[5:]


@pytest.mark.parametrize(
    ("cls", "blocks", "v"),
    [(NAMO, 1, ()), (NAMO, 3, (3,)), (NAMOD, 1, (4,)), (NAMOD, 3, (3, 4)), (AdaMuon, 3, (6, 4)), (Muon, 1, None)],
)
def test_the_second_moment_is_one_number_by_matrix_by_column_or_by_element(cls, blocks, v):
    p = parameter(6, 4)
    state = cls([{"params": [p], "blocks": blocks}]).state[p]
    assert (tuple(state["v"].shape) if "v" in state else None) == v
    assert state["momentum_buffer"].shape == p.shape
    assert state["step"].shape == state["skipped"].shape == ()


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.qkv = nn.Linear(4, 12)
        self.up = nn.ConvTranspose1d(4, 6, 3)


@all_optimizers
@pytest.mark.parametrize("coefficients", ["polar_express", [[3.0, -4.0, 2.0], (2.0, -1.5, 0.5)], (3, -4, 2)])
def test_state_dicts_are_plain_enough_for_weights_only(cls, coefficients):
    groups = split_parameters(Fused(), blocks={"qkv.weight": (2, 4, 6)})
    optimizer = run(cls(groups, ns_coefficients=coefficients), 0)
    loaded = through_a_file(optimizer.state_dict())
    fresh = cls(split_parameters(Fused(), blocks={"qkv.weight": (2, 4, 6)}))
    fresh.load_state_dict(loaded)
    assert_same(fresh, optimizer)


@all_optimizers
@pytest.mark.parametrize("number", [numpy.float64, NonNegativeFloat], ids=["numpy", "command line"])
def test_numbers_of_other_types_become_plain(cls, number):
    optimizer = build(cls, lr=number(0.02), momentum=number(0.5), adamw_betas=(number(0.8), number(0.9)))
    optimizer.add_param_group({"params": [parameter(3, 3)], "lr": number(0.03), "weight_decay": number(0.3)})
    groups = through_a_file(optimizer.state_dict())["param_groups"]
    assert [group["lr"] for group in groups] == [0.02] * 4 + [0.03]
    assert {type(value) for group in groups for value in group.values()} <= {bool, int, float, str, list, type(None)}


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loaded_optimizer_goes_on_identically(cls, dtype):
    whole, first, second = run(build(cls, dtype), 0, 1, 2, 3), run(build(cls, dtype), 0, 1), build(cls, dtype)
    state = copy.deepcopy(through_a_file(first.state_dict()))
    second.load_state_dict(state)
    for p, q in zip(parameters(second), parameters(first), strict=True):
        p.data.copy_(q)
    assert_same_run(run(second, 2, 3), whole)


@all_optimizers
def test_statistics_stay_float32_when_bfloat16_parameters_load_them(cls):
    trained, fresh = run(build(cls, torch.bfloat16), 0, 1, 2), build(cls, torch.bfloat16)
    fresh.load_state_dict(trained.state_dict())
    for p, q in zip(parameters(fresh), parameters(trained), strict=True):
        for key in {"v", "step", "skipped"} & set(trained.state[q]):
            assert fresh.state[p][key].dtype == torch.float32
            assert_same(fresh.state[p][key], trained.state[q][key])


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
]


@all_optimizers
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_of_an_optimizer_goes_on_identically(cls, copied, steps):
    optimizer = run(build(cls), *range(steps))
    twin = copied(optimizer)
    assert not {id(p) for p in parameters(twin)} & {id(p) for p in parameters(optimizer)}
    run(twin, 5, 6)
    assert_same_run(twin, run(optimizer, 5, 6))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_keeps_the_bound_on_its_buckets(copied):
    optimizer = build(NAMO)
    optimizer.bucket_bytes = 50
    assert copied(optimizer).bucket_bytes == 50


@pytest.mark.parametrize("steps", [0, 3, 9])
def test_a_group_added_during_warm_up_ends_at_the_learning_rate_of_the_others(steps):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    optimizer = NAMO(split_parameters(module), lr=0.01, adamw_lr=0.002)
    scheduler = WarmupStableDecay(warmup=10)(optimizer)
    for step in range(12):
        if step == steps:
            optimizer.add_param_group({"params": list(module[1].requires_grad_(True).parameters())})
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.002, 0.002, 0.01])


@all_optimizers
def test_learning_rates_of_numpy_are_taken(cls):
    optimizer = cls([parameter(3, 3)], lr=numpy.float32(0.5))
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_blocks_given_as_a_tuple_are_those_of_a_checkpoint():
    optimizer = NAMO([{"params": [parameter(6, 4)], "blocks": (2, 4)}])
    assert optimizer.param_groups[0]["blocks"] == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_may_be_cast_after_the_optimizer_was_built(dtype):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = NAMO(split_parameters(module))
    module.to(dtype)(torch.ones(2, 4, dtype=dtype)).square().sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_follows_a_module_that_is_cast_between_two_steps(cls, dtype):
    modules = [nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    cast, steady = (cls(split_parameters(module), lr=0.01, orthogonalizer="svd") for module in modules)
    for step in range(3):
        if step == 1:
            modules[0].to(dtype)
        for module, optimizer in zip(modules, (cast, steady), strict=True):
            optimizer.zero_grad()
            weight = module[0].weight
            module(torch.arange(8.0).view(2, 4).to(weight.dtype)).pow(3).sum().backward()
            weight.grad.add_(torch.eye(3, 4, dtype=weight.dtype) * (step + 1) * weight.grad.abs().max())
            optimizer.step()
    fresh = cls(split_parameters(modules[0]))
    for parameter, state in cast.state.items():
        assert {key: value.dtype for key, value in state.items()} == {
            key: value.dtype for key, value in fresh.state[parameter].items()
        }
    tolerance = 1000 * torch.finfo(dtype).eps
    expected = [parameter.to(dtype) for parameter in modules[1].parameters()]
    torch.testing.assert_close(list(modules[0].parameters()), expected, rtol=tolerance, atol=tolerance)


def test_a_copy_routes_new_parameters_as_the_original():
    module = Fused()
    module.up.requires_grad_(False)
    twin, module = copy.deepcopy((NAMO(split_parameters(module)), module))
    twin.add_param_group({"params": list(module.up.requires_grad_(True).parameters())})
    assert [group["name"] for group in twin.param_groups[2:]] == ["adamw_2", "matrices_transposed"]


@all_optimizers
def test_small_buckets_change_nothing(cls):
    small = build(cls)
    small.bucket_bytes = 1
    assert_same_run(run(small, 0, 1), run(build(cls), 0, 1))


@all_optimizers
def test_a_generator_of_parameters_works(cls):
    shapes = [(6, 4), (4, 4)]
    expected = run(cls([parameter(*shape) for shape in shapes]), 0)
    assert_same_run(run(cls(parameter(*shape) for shape in shapes), 0), expected)
    assert_same_run(run(cls([{"params": (parameter(*shape) for shape in shapes)}]), 0), expected)


@all_optimizers
def test_named_parameters_work(cls):
    optimizer = run(cls([("first", parameter(6, 4)), ("second", parameter(4, 4))]), 0)
    assert optimizer.param_groups[0]["param_names"] == ["first", "second"]
    assert_same(
        [p.detach() for p in parameters(optimizer)],
        [p.detach() for p in parameters(run(cls([parameter(6, 4), parameter(4, 4)]), 0))],
    )


@all_optimizers
def test_an_empty_group_beside_others_trains_them(cls):
    groups = [{"params": [parameter(6, 4)]}, {"params": []}, {"params": [], "orthogonalize": False}]
    assert_same(parameters(run(cls(groups), 0)), parameters(run(cls([parameter(6, 4)]), 0)))


@all_optimizers
def test_an_added_group_trains_as_one_that_was_there(cls):
    added, (p, q) = parameter(4, 4, seed=9), (parameter(4, 4, seed=9), parameter(6, 4))
    optimizer = run(cls([q]), 0)
    optimizer.add_param_group({"params": added, "lr": 0.5, "name": "later"})
    assert (optimizer.param_groups[1]["name"], optimizer.param_groups[1]["lr"]) == ("later", 0.5)
    alone = cls([p], lr=0.5)
    for seed in (1, 2):
        added.grad = p.grad = randn(4, 4, seed=seed)
        optimizer.step()
        alone.step()
    assert_same(added, p)


def test_names_of_groups_are_told_apart():
    optimizer = NAMO([{"params": [parameter(2, 2)]}, {"params": [parameter(2, 2)]}])
    for name in ("matrices", "mine", "mine"):
        optimizer.add_param_group({"params": [parameter(2, 2)], "name": name})
    optimizer.add_param_group({"params": [parameter(2)], "orthogonalize": False})
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["matrices", "matrices_2", "matrices_3", "mine", "mine_2", "adamw"]


def test_the_dict_of_an_added_group_stays_the_users():
    group = {"params": [parameter(2, 2)]}
    NAMO([parameter(2, 2)]).add_param_group(group)
    assert list(group) == ["params"]


def late_module() -> tuple[nn.Module, OrthogonalizedOptimizer]:
    """A module of two layers and an optimizer that was built while the second was frozen."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[1].requires_grad_(False)
    optimizer = NAMO(split_parameters(module), lr=0.1, adamw_lr=0.01)
    module[1].requires_grad_(True)
    return module, optimizer


def test_parameters_added_later_are_routed_as_the_module_was():
    module, optimizer = late_module()
    optimizer.add_param_group({"params": list(module[1].parameters()), "lr": 0.05})
    adamw, matrices = optimizer.param_groups[2:]  # BackboneFinetuning drives the last group's lr
    assert (matrices["params"], matrices["name"], matrices["lr"]) == ([module[1].weight], "matrices_2", 0.05)
    assert (adamw["params"], adamw["name"], adamw["lr"]) == ([module[1].bias], "adamw_2", pytest.approx(0.005))
    assert matrices["param_names"] == ["1.weight"]
    assert [matrices["orthogonalize"], adamw["orthogonalize"]] == [True, False]


# --- gradients that are missing or not finite -----------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("missing", range(5))
def test_a_parameter_without_a_gradient_is_left_alone_and_no_other(cls, missing):
    optimizer, expected = run(build(cls), 0), run(build(cls), 0, 1)
    p = parameters(optimizer)[missing]
    before = snapshot(optimizer, p)
    set_gradients(optimizer, 1)
    p.grad = None
    optimizer.step()
    assert_same(snapshot(optimizer, p), before)
    assert optimizer.skipped_steps() == 0
    for index, (q, r) in enumerate(zip(parameters(optimizer), parameters(expected), strict=True)):
        assert torch.equal(q, r) == (index != missing)


@all_optimizers
def test_a_step_without_any_gradient_changes_nothing(cls):
    optimizer = run(build(cls), 0)
    before = copy.deepcopy((optimizer.state_dict(), parameters(optimizer)))
    optimizer.zero_grad()
    optimizer.step()
    assert_same(optimizer.state_dict()["state"], before[0]["state"])
    assert_same(parameters(optimizer), before[1])


@all_optimizers
@pytest.mark.parametrize(("value", "dtype"), [(nan, torch.float32), (inf, torch.bfloat16), (-inf, torch.float64)])
@pytest.mark.parametrize("bad", range(5))
def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone_and_no_other(cls, value, dtype, bad):
    optimizer, expected = (run(build(cls, dtype, lr=0.1), *seeds) for seeds in ([0], [0, 1]))
    p = parameters(optimizer)[bad]
    before = snapshot(optimizer, p)
    set_gradients(optimizer, 1)
    p.grad.view(-1)[2] = value
    optimizer.step()
    assert_same(snapshot(optimizer, p), before)
    for index, (q, r) in enumerate(zip(parameters(optimizer), parameters(expected), strict=True)):
        assert torch.equal(q, r) == (index != bad)
    skipped = [int(optimizer.state[q]["skipped"]) for q in parameters(optimizer)[:3]]
    assert skipped == [int(index == bad) for index in range(3)]
    assert optimizer.skipped_steps() == 1


def run_steps(optimizer, count):
    for _ in range(count):
        optimizer.step()


def test_a_parameter_unfrozen_behind_the_optimizers_back_is_warned_of_once():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[0].requires_grad_(False)
    optimizer = NAMO(split_parameters(module))
    module.requires_grad_(True)
    for _ in range(2):
        module(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"0\.weight of Sequential has a gradient but is in no group of NAMO") as found:
        run_steps(optimizer, 2)
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_large_finite_adamw_gradient_is_not_taken_for_infinite(dtype):
    table, matrix = parameter(500, 64, dtype=dtype), parameter(4, 4)
    optimizer = NAMO([{"params": [matrix]}, {"params": [table], "orthogonalize": False}])
    table.grad, before = torch.full_like(table, 6e4), table.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert not torch.equal(table, before)


@all_optimizers
def test_training_goes_on_after_a_bad_step_as_if_it_had_not_been(cls):
    optimizer = run(build(cls), 0)
    for p in parameters(optimizer):
        p.grad = torch.full_like(p, nan)
    optimizer.step()
    run(optimizer, 1, 2)
    for state in optimizer.state.values():
        if "skipped" in state:
            assert state["skipped"] == 1
            state["skipped"].zero_()
    assert_same_run(optimizer, run(build(cls), 0, 1, 2))


@all_optimizers
def test_an_adamw_group_is_left_alone_as_a_whole(cls):
    pair = [parameter(5), parameter(3, seed=1)]
    optimizer = cls([{"params": [parameter(6, 4)]}, {"params": pair, "orthogonalize": False}])
    run(optimizer, 0)
    before = [snapshot(optimizer, p) for p in pair]
    set_gradients(optimizer, 1)
    pair[0].grad[0] = inf
    optimizer.step()
    assert_same([snapshot(optimizer, p) for p in pair], before)


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a value on the device."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **kwargs or {})


def test_reads_of_the_device_are_counted():
    with HostReads() as reads:
        torch.ones(1).item()
        bool(torch.ones(()) > 0)
    assert reads.count == 2


@all_optimizers
@pytest.mark.parametrize("value", [1.0, nan])
def test_a_step_reads_nothing_from_the_device(cls, value):
    optimizer = build(cls)
    for seed in range(3):  # the first plans, too
        set_gradients(optimizer, seed)
        parameters(optimizer)[0].grad[0, 0] = parameters(optimizer)[3].grad[0] = value
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0


class HostWrites(TorchFunctionMode):
    """Counts tensors made of the host's numbers: a copy to the device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.tensor, torch.as_tensor)
        return func(*args, **kwargs or {})


@all_optimizers
def test_a_planned_step_of_matrices_neither_reads_nor_writes_across_devices(cls):
    # The meta device has no values: whatever needs one there raises, tolist() and numpy() included.
    groups = [{"params": nn.Parameter(torch.empty(6, 4, device="meta")), "blocks": blocks} for blocks in (1, 3)]
    optimizer = cls(groups)
    for p in parameters(optimizer):
        p.grad = torch.empty_like(p)
    optimizer.step()
    with HostWrites() as writes:
        optimizer.step()
    assert writes.count == 0


class Dispatched(TorchDispatchMode):
    """Counts the operations that torch dispatches: on an accelerator about as many launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def operations_of_a_step(cls, shapes, bucket_bytes=None):
    matrices, vectors = [parameter(*shape) for shape in shapes], [parameter(5) for _ in shapes]
    optimizer = cls([{"params": matrices}, {"params": vectors, "orthogonalize": False}])
    optimizer.bucket_bytes = bucket_bytes or optimizer.bucket_bytes
    run(optimizer, 0)
    set_gradients(optimizer, 1)
    with Dispatched() as dispatched:
        optimizer.step()
    return dispatched.count


@all_optimizers
def test_operations_grow_with_buckets_and_not_with_matrices_of_a_shape(cls):
    few, many = (operations_of_a_step(cls, [(8, 12)] * count) for count in (4, 64))
    assert many == few
    assert operations_of_a_step(cls, [(8, 12)] * 64, bucket_bytes=16 * 8 * 12 * 2) <= 4 * few
    assert few < operations_of_a_step(cls, [(8, 12), (8, 16)] * 32) <= 2 * few


@all_optimizers
def test_learning_rate_and_decay_may_be_tensors_that_a_captured_step_reads_anew(cls):
    floats, tensors = build(cls, lr=0.02, weight_decay=0.3), build(cls, lr=0.02, weight_decay=0.3)
    for group in tensors.param_groups:
        for key in ("lr", "weight_decay") if group["orthogonalize"] else ("lr",):
            group[key] = torch.tensor(group[key])
    for seed, factor in enumerate((1.0, 0.5)):
        for theirs, ours in zip(floats.param_groups, tensors.param_groups, strict=True):
            theirs["lr"] *= factor
            ours["lr"].mul_(factor)
        run(floats, seed)
        set_gradients(tensors, seed)
        with HostReads() as reads:
            tensors.step()
        assert reads.count == 0
    for p, q in zip(parameters(tensors), parameters(floats), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
def test_the_momentum_is_kept_in_the_dtype_that_was_asked_for(cls, dtype, momentum_dtype):
    ours, exact = ([parameter(6, 4, dtype=of), parameter(6, 4, seed=1, dtype=of)] for of in (dtype, torch.float64))
    optimizer, reference = cls(ours, lr=0.01, momentum_dtype=momentum_dtype), cls(exact, lr=0.01)
    for seed in range(4):
        run(optimizer, seed)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.double()
        reference.step()
    state = optimizer.state[ours[0]]
    assert state["momentum_buffer"].dtype == getattr(torch, momentum_dtype)
    for p, q in zip(ours, exact, strict=True):
        momenta = [o.state[x]["momentum_buffer"].double() for o, x in ((optimizer, p), (reference, q))]
        tolerance = 1e-2 if momentum_dtype == "bfloat16" else 1e-6
        assert (momenta[0] - momenta[1]).norm() <= tolerance * momenta[1].norm()
    loaded = cls([parameter(6, 4, dtype=dtype), parameter(6, 4, dtype=dtype)], momentum_dtype=momentum_dtype)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(loaded.state[loaded.param_groups[0]["params"][0]], state)


@all_optimizers
def test_a_checkpoint_is_loaded_into_the_momentum_dtype_of_the_optimizer(cls):
    trained = run(build(cls), 0)
    loaded = build(cls, momentum_dtype="bfloat16")
    loaded.load_state_dict(copy.deepcopy(trained.state_dict()))
    for p, q in zip(parameters(loaded), parameters(trained), strict=True):
        if "momentum_buffer" in trained.state[q]:
            momentum = trained.state[q]["momentum_buffer"]
            assert_same(loaded.state[p]["momentum_buffer"], momentum.bfloat16())
    assert {group.get("momentum_dtype", "bfloat16") for group in loaded.param_groups} == {"bfloat16"}


# --- refusals -------------------------------------------------------------------------------------


def refused(match: str) -> pytest.RaisesExc:
    return pytest.raises(ValueError, match=match)


@all_optimizers
@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_parameter_that_is_no_matrix_is_refused_with_the_way_out(cls, shape):
    with refused(r"parameter 1 has shape.*split_parameters.*orthogonalize=False"):
        cls([parameter(3, 3), parameter(*shape)])


def test_a_refused_parameter_is_named():
    with refused(r"first\.bias has shape \(3,\)"):
        NAMO([("first.weight", parameter(3, 3)), ("first.bias", parameter(3))])


@all_optimizers
def test_a_complex_matrix_is_refused_with_the_way_out(cls):
    with refused(r"real matrices.*complex64.*AdamW"):
        cls([parameter(3, 3, dtype=torch.complex64)])


@all_optimizers
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_a_sparse_gradient_is_refused_before_anything_moves(cls, orthogonalize):
    table = parameter(5, 4)
    optimizer = cls([{"params": [parameter(3, 3)]}, {"params": [table], "orthogonalize": orthogonalize}])
    run(optimizer, 0)
    before = copy.deepcopy((optimizer.state_dict()["state"], parameters(optimizer)))
    set_gradients(optimizer, 1)
    table.grad = table.grad.to_sparse()
    with refused(r"dense gradient.*sparse=False"):
        optimizer.step()
    assert_same((optimizer.state_dict()["state"], parameters(optimizer)), before)


OUT_OF_RANGE = [
    ("lr", -1e-3),
    ("lr", nan),
    ("lr", inf),
    ("lr", "1e-3"),
    ("weight_decay", -0.1),
    ("weight_decay", inf),
    ("weight_decay", nan),
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("momentum", nan),
    ("ns_steps", 0),
    ("ns_steps", -1),
    ("ns_steps", 2.5),
    ("ns_coefficients", (1.0, 2.0, nan)),
    ("ns_coefficients", "cubic"),
    ("ns_coefficients", []),
    ("ns_coefficients", (1.0, 2.0)),
    ("ns_coefficients", [(1.0, 2.0, 3.0)] * 6),
    ("orthogonalizer", "qr"),
    ("shape_scale", 0.0),
    ("momentum_dtype", "float16"),
]
OUT_OF_RANGE_BY_CLASS = [(cls, key, value) for cls in OPTIMIZERS for key, value in OUT_OF_RANGE]
OUT_OF_RANGE_BY_CLASS += [
    (cls, key, value)
    for cls in (NAMO, NAMOD, AdaMuon)
    for key, value in [("beta2", -0.1), ("beta2", 1.0), ("beta2", nan), ("eps", -1e-8), ("eps", nan)]
]
OUT_OF_RANGE_BY_CLASS += [
    (cls, key, value)
    for cls in (NAMO, NAMOD)
    for key, value in [("max_step", 0.0), ("max_step", -1.0), ("decay", "no")]
]
OUT_OF_RANGE_BY_CLASS += [(NAMOD, "clamp", value) for value in (-0.1, 1.1, nan, inf)]


@pytest.mark.parametrize(("cls", "key", "value"), OUT_OF_RANGE_BY_CLASS)
def test_a_hyper_parameter_out_of_range_is_refused_by_name(cls, key, value):
    with refused(rf"[Ee]xpected {key} "):
        cls([parameter(3, 3)], **{key: value})
    with refused(rf"[Ee]xpected {key} "):
        cls([{"params": [parameter(3, 3)], key: value}])


@all_optimizers
@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1.0), ("lr", inf), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("eps", -1.0), ("weight_decay", -1.0)],
)
def test_a_hyper_parameter_of_adamw_out_of_range_is_refused(cls, key, value):
    with refused(rf"AdamW: expected {key}"):
        build(cls, **{f"adamw_{key}": value})


@adaptive_optimizers
@pytest.mark.parametrize(("momentum", "beta2"), [(0.95, 0.9), (0.9, 0.81), (0.5, 0.25), (0.5, 0.0)])
def test_a_momentum_that_outlives_the_second_moment_is_refused(cls, momentum, beta2):
    with refused(r"expected beta2 to be above momentum\^2"):
        cls([parameter(3, 3)], momentum=momentum, beta2=beta2)


@adaptive_optimizers
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99])
def test_no_momentum_goes_with_any_second_moment(cls, beta2):
    optimizer = run(cls([parameter(3, 3)], momentum=0.0, beta2=beta2), 0)
    assert not torch.equal(parameters(optimizer)[0], parameter(3, 3))


def test_a_clamp_of_none_or_zero_is_off():
    start = randn(6, 4)
    start_grads = [randn(6, 4, seed=s) * torch.tensor([1e-3, 1, 1, 1e3]) for s in (1, 2)]
    weights = {}
    for clamp in (None, 0, 0.9):
        p = nn.Parameter(start.clone())
        optimizer = NAMOD([p], clamp=clamp)
        for grad in start_grads:
            p.grad = grad.clone()
            optimizer.step()
        weights[clamp] = p.detach()
    assert_same(weights[None], weights[0])
    assert not torch.equal(weights[None], weights[0.9])


@all_optimizers
@pytest.mark.parametrize(
    "groups", [[], [{"params": []}], [{"params": []}, {"params": [parameter(3)], "orthogonalize": False}]]
)
def test_a_set_of_no_matrices_is_refused(cls, groups):
    with refused("empty|at least one matrix"):
        cls(groups)


@all_optimizers
def test_adamw_groups_alone_are_refused_with_the_way_out(cls):
    with refused(r"at least one matrix.*torch\.optim\.AdamW"):
        cls([{"params": [parameter(3)], "orthogonalize": False}])


@pytest.mark.parametrize(
    ("blocks", "transposed"), [(5, False), ([3, 4], False), (4, True), (0, False), ([6, 0], False)]
)
def test_blocks_that_do_not_fit_are_refused(blocks, transposed):
    with refused("blocks of parameter 0"):
        NAMO([{"params": [parameter(6, 5)], "blocks": blocks, "transposed": transposed}])


def bad_groups() -> Iterator[tuple[str, object]]:
    """Names of what is wrong, and functions from an optimizer to a group that it must refuse."""
    yield "vector", lambda o: {"params": [parameter(3, 3), parameter(3)]}
    yield "range", lambda o: {"params": [parameter(3, 3)], "lr": -1.0}
    yield "adamw range", lambda o: {"params": [parameter(3)], "orthogonalize": False, "eps": -1.0}
    yield "blocks", lambda o: {"params": [parameter(3, 3)], "blocks": 2}
    yield "twice", lambda o: {"params": [parameter(3, 3), parameters(o)[0]]}
    yield "names", lambda o: {"params": [("new", parameter(3, 3))]}
    yield "no leaf", lambda o: {"params": [parameter(3, 3) * 2]}
    yield "complex", lambda o: {"params": [parameter(3, 3, dtype=torch.complex64)]}
    yield "set", lambda o: {"params": {parameter(3, 3), parameter(4, 4)}}
    yield "no params", lambda o: {}


@pytest.mark.parametrize("make", [make for _, make in bad_groups()], ids=[name for name, _ in bad_groups()])
@all_optimizers
def test_a_refused_group_leaves_the_optimizer_as_it_was(cls, make):
    optimizer = run(build(cls), 0)
    groups = len(optimizer.param_groups)
    with pytest.raises((ValueError, TypeError, KeyError)):
        optimizer.add_param_group(make(optimizer))
    assert len(optimizer.param_groups) == groups
    assert len(optimizer.state) == 5
    assert_same_run(run(optimizer, 1), run(build(cls), 0, 1))


def test_a_group_to_be_routed_is_added_whole_or_not_at_all():
    module, optimizer = late_module()
    with refused("more than one parameter group"):
        optimizer.add_param_group({"params": [module[1].weight, module[0].bias]})
    assert len(optimizer.param_groups) == 2
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group.pop("beta2"), "expected beta2 to be in the checkpoint but got nothing. That is of group"),
        (lambda group: group.update(lr=-1.0), "expected lr to be a finite number >= 0 but got -1.0. That is of group"),
        (
            lambda group: group.update(ns_steps=0),
            "expected ns_steps to be a whole number >= 1 but got 0. That is of group",
        ),
    ],
)
def test_a_checkpoint_with_wrong_hyper_parameters_is_refused_and_nothing_is_loaded(change, message):
    saved, optimizer = copy.deepcopy(run(build(NAMO), 0).state_dict()), build(NAMO)
    before = [snapshot(optimizer, p) for p in parameters(optimizer)]
    change(saved["param_groups"][0])
    with refused(message):
        optimizer.load_state_dict(saved)
    assert_same([snapshot(optimizer, p) for p in parameters(optimizer)], before)


@pytest.mark.parametrize("other", [NAMO, Muon, AdaMuon], ids=lambda cls: cls.__name__)
def test_the_state_of_another_algorithm_is_refused_and_nothing_is_loaded(other):
    optimizer = run(build(NAMOD), 0)
    before = [snapshot(optimizer, p) for p in parameters(optimizer)]
    with pytest.raises(
        ValueError,
        match=f"a checkpoint of NAMOD, but it has algorithm='{other.__name__}'.*adopt_state.*Nothing was loaded",
    ):
        optimizer.load_state_dict(run(build(other), 0, 1).state_dict())
    for p, kept in zip(parameters(optimizer), before, strict=True):
        assert_same(snapshot(optimizer, p), kept)


def test_states_assigned_to_other_parameters_by_position_are_refused():
    table, matrix = parameter(6, 6), parameter(6, 6)
    state = NAMO([{"params": [matrix]}, {"params": [table], "orthogonalize": False}]).state_dict()
    state["state"] = {0: state["state"][1], 1: state["state"][0]}
    optimizer = NAMO([{"params": [matrix]}, {"params": [table], "orthogonalize": False}])
    with pytest.raises(ValueError, match=r"the checkpoint has exp_avg \(6, 6\), exp_avg_sq \(6, 6\), step \(\)"):
        optimizer.load_state_dict(state)
