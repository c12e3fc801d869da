"""torch's inputs for optimizers, and the patterns of its test suite (test/test_optim.py), over our four optimizers."""

import copy
import io
import pickle
import sys
import types
import unittest
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from lightning_namo import NAMO, NAMOD, build_optimizer
from lightning_namo.torch_versions import eagerly
from tests.helpers.optimizers import (
    COPIES,
    OPTIMIZERS,
    all_optimizers,
    assert_same_run,
    built_in_optimizers,
    parameter,
    parameters,
    randn,
    run,
    set_gradients,
    through_a_file,
)
from tests.helpers.optimizers import build as build_groups
from tests.helpers.rules import taken
from tests.helpers.toy import assert_same

if "expecttest" not in sys.modules:  # torch's test helpers import it, and nothing here uses it
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
from torch.testing._internal.common_optimizers import optim_db

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INFOS = {info.optim_cls.__name__: info for info in optim_db}
SOURCES = ("AdamW", "Muon", "SGD")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


dtypes_and_tensor_lr = pytest.mark.parametrize(
    ("dtype", "tensor_lr"), [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]
)


def build(cls: type, dtype: torch.dtype = torch.float32, **hyper: object) -> torch.optim.Optimizer:
    """The matrix and the bias that torch's suite trains."""
    return cls(
        [
            {"params": [parameter(10, 5, seed=1, dtype=dtype)]},
            {"params": [parameter(10, seed=2, dtype=dtype)], "orthogonalize": False},
        ],
        **hyper,
    )


def closure_of(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """The loss of torch's suite: ``||W x + b||^2``."""
    weight, bias = parameters(optimizer)
    x = 0.3 * randn(5, seed=3).to(weight.dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return closure


def assert_loss_falls(optimizer: torch.optim.Optimizer, steps: int = 5, after: Callable[[Tensor], None] = id) -> None:
    closure = closure_of(optimizer)
    first = closure().item()
    for _ in range(steps):
        after(optimizer.step(closure))
    assert closure().item() < first


# --- torch's inputs -------------------------------------------------------------------------------


NO_COUNTERPART = {
    "maximize",
    "amsgrad",
    "dampening",
    "capturable",
    "foreach",
    "fused",
    "differentiable",
    "adjust_lr_fn",
}


def translated(source: str, kwargs: dict[str, object]) -> dict[str, object] | None:
    """Our hyper-parameters for those of an optimizer of torch; None where there are none."""
    if NO_COUNTERPART & set(kwargs):
        return None
    if source != "AdamW":
        return dict(kwargs)
    ours = {key: value for key, value in kwargs.items() if key in ("lr", "weight_decay")}
    return ours | {f"adamw_{key}": value for key, value in kwargs.items() if key != "lr"}


def torch_inputs() -> Iterator[object]:
    for dtype in DTYPES:
        seen = set()
        for source in SOURCES:
            for given in INFOS[source].optim_inputs_func("cpu", dtype):
                ours = translated(source, given.kwargs)
                if ours is not None and str(ours) not in seen:
                    seen.add(str(ours))
                    yield pytest.param(dtype, ours, id=f"{source}-{given.desc}-{dtype}".replace("torch.", ""))


@built_in_optimizers
@pytest.mark.parametrize(("dtype", "kwargs"), list(torch_inputs()))
def test_an_input_of_torch_lowers_the_loss(cls, dtype, kwargs):
    optimizer = build(cls, dtype, **{"lr": 0.02} | kwargs)
    assert_loss_falls(optimizer)
    assert all(p.dtype == dtype for p in parameters(optimizer))


# What torch refuses and we do not: 3-D parameters, which are flattened, and betas of which one is a tensor.
NOT_REFUSED = {
    "only support 2D parameters",
    "betas must be either both floats or both Tensors",
}
MESSAGES = {
    "Tensor lr must be 1-element": r"expected lr to be a finite number >= 0 but got tensor\(",
    "beta1 should be between 0 and 1": r"expected adamw_betas to be two numbers in \[0, 1\) but got \(1\.0, 0\.0\)",
    "weight_decay should > 0": r"expected (adamw_)?weight_decay to be a finite number >= 0 but got -1\.",
    "momentum should be between 0 and 1": r"expected momentum to be in \[0, 1\)",
    "does not support complex parameters": r"real matrices.*complex64",
}


def torch_error_inputs() -> Iterator[object]:
    seen = set(NOT_REFUSED)
    for source in SOURCES:
        for error in INFOS[source].optim_error_inputs_func("cpu", torch.float32):
            given = error.optimizer_error_input
            kwargs = translated(source, given.kwargs)
            if kwargs is not None and given.desc not in seen:
                seen.add(given.desc)
                yield pytest.param(given, kwargs, error, id=given.desc)


@built_in_optimizers
@pytest.mark.parametrize(("given", "kwargs", "error"), list(torch_error_inputs()))
def test_what_torch_refuses_is_refused(cls, given, kwargs, error):
    params = [parameter(2, 2)] if given.params is None else given.params
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            cls(params, **kwargs)
        return
    kind = TypeError if error.error_type is TypeError else ValueError
    with pytest.raises(kind, match=MESSAGES.get(given.desc, error.error_regex)):
        cls(params, **kwargs)


def test_all_error_inputs_of_torch_are_accounted_for():
    descriptions = {param.id for param in torch_error_inputs()}
    assert set(MESSAGES) <= descriptions
    assert len(descriptions) == len(MESSAGES) + 5  # and the generic ones that have torch's message


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@all_optimizers
@pytest.mark.parametrize("named", [False, True])
def test_a_parameter_listed_twice_in_a_group_is_trained_once(cls, named):
    members = [("first", parameter(4, 3)), ("second", parameter(5, 3))] if named else [parameter(4, 3), parameter(5, 3)]
    twice, once = cls([*members, members[0], members[1]]), cls([parameter(4, 3), parameter(5, 3)])
    assert_same([p.detach() for p in parameters(run(twice, 0, 1))], [p.detach() for p in parameters(run(once, 0, 1))])
    if named:
        assert twice.param_groups[0]["param_names"] == ["first", "second"]
    fresh = cls([parameter(4, 3), parameter(5, 3)] if not named else [(n, parameter(*p.shape)) for n, p in members])
    fresh.load_state_dict(twice.state_dict())
    assert_same(fresh, twice)


# --- learning rates and groups --------------------------------------------------------------------


LR = 2**-5  # exact in every dtype


@all_optimizers
@all_dtypes
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_learning_rate_trains_as_the_number(cls, dtype, shape):
    lr = torch.full(shape, LR)
    by_tensor, by_number = build(cls, dtype, lr=lr), build(cls, dtype, lr=LR)
    for optimizer in (by_tensor, by_number):
        run(optimizer, 1, 2, 3)
    torch.testing.assert_close(parameters(by_tensor), parameters(by_number))
    assert lr.eq(LR).all()


def plateau_steps(optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
    plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    losses = iter([1.0] * 20)
    return [lambda: plateau.step(next(losses))]


def stepped(*makers: Callable) -> Callable[[torch.optim.Optimizer], list[Callable[[], None]]]:
    def make(optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        return [scheduler.step for scheduler in [maker(optimizer) for maker in makers]]

    return make


S = schedulers
SCHEDULERS = {
    "LambdaLR": stepped(lambda o: S.LambdaLR(o, lambda step: 0.9**step)),
    "MultiplicativeLR": stepped(lambda o: S.MultiplicativeLR(o, lambda step: 0.9)),
    "StepLR": stepped(lambda o: S.StepLR(o, 2, gamma=0.5)),
    "MultiStepLR": stepped(lambda o: S.MultiStepLR(o, [1, 4], gamma=0.5)),
    "ConstantLR": stepped(lambda o: S.ConstantLR(o, factor=0.4, total_iters=4)),
    "LinearLR": stepped(lambda o: S.LinearLR(o, start_factor=0.4, total_iters=4)),
    "ExponentialLR": stepped(lambda o: S.ExponentialLR(o, gamma=0.9)),
    "SequentialLR": stepped(
        lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=3), S.CosineAnnealingLR(o, T_max=5)], milestones=[3])
    ),
    "PolynomialLR": stepped(lambda o: S.PolynomialLR(o, total_iters=6, power=0.9)),
    "CosineAnnealingLR": stepped(lambda o: S.CosineAnnealingLR(o, T_max=6)),
    "ChainedScheduler": stepped(
        lambda o: S.ChainedScheduler([S.ConstantLR(o, factor=0.4, total_iters=4), S.ExponentialLR(o, gamma=0.9)])
    ),
    "ReduceLROnPlateau": plateau_steps,
    "CyclicLR": stepped(lambda o: S.CyclicLR(o, 0.01, 0.1, step_size_up=3)),
    "CosineAnnealingWarmRestarts": stepped(lambda o: S.CosineAnnealingWarmRestarts(o, T_0=3)),
    "OneCycleLR": stepped(lambda o: S.OneCycleLR(o, max_lr=0.1, total_steps=9)),
    "SWALR": stepped(lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=4)),
    "two at once": stepped(lambda o: S.StepLR(o, 2, gamma=0.5), lambda o: S.LinearLR(o, 0.4, 0.6, total_iters=4)),
}


def test_every_scheduler_of_torch_is_in_the_list():
    assert set(schedulers.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


def scheduled(optimizer: torch.optim.Optimizer, steps: int, make: Callable) -> list[tuple[float, float]]:
    """The learning rate and momentum of each step."""
    advance, used = make(optimizer), []
    for seed in range(steps):
        group = optimizer.param_groups[0]
        used.append((float(group["lr"]), float(group["momentum"])))
        run(optimizer, seed)
        for step in advance:
            step()
    return used


@all_optimizers
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_follows_a_scheduler_of_torch(cls, name, kind):
    optimizer = build(cls, lr=kind(LR), momentum=0.9)
    expected = scheduled(torch.optim.SGD([parameter(2, 2)], lr=LR, momentum=0.9), 5, SCHEDULERS[name])
    assert scheduled(optimizer, 5, SCHEDULERS[name]) == [pytest.approx(pair) for pair in expected]
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (kind is not float)

    by_hand = build(cls, momentum=0.9)
    cycles = name in ("CyclicLR", "OneCycleLR")  # which drive beta1 of AdamW's groups, too
    for seed, (lr, momentum) in enumerate(expected):
        for group in by_hand.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum if cycles else group["momentum"]
        run(by_hand, seed)
    torch.testing.assert_close(parameters(optimizer), parameters(by_hand), rtol=1e-5, atol=1e-5)


def scheduler_inputs() -> list[object]:
    return [
        pytest.param(makers, id=f"{name}-{index}")
        for name in ("Adam", "SGD")
        for index, makers in enumerate(INFOS[name].scheduler_inputs)
    ]


@all_optimizers
@pytest.mark.parametrize("makers", scheduler_inputs())
def test_the_loss_falls_with_the_schedulers_of_torchs_suite(cls, makers):
    optimizer = build(cls, lr=torch.tensor(0.02))
    made = [maker(optimizer) for maker in makers]

    def advance(loss: Tensor) -> None:
        for scheduler in made:
            scheduler.step(*([loss.item()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))

    assert_loss_falls(optimizer, after=advance)


@all_optimizers
def test_a_group_with_no_learning_rate_stays_and_the_others_move(cls):
    resting, moving = parameter(6, 4), parameter(6, 4)
    optimizer = run(cls([{"params": [resting], "lr": 0.0}, {"params": [moving]}]), 1, 2)
    assert_same(resting, parameter(6, 4))
    assert not torch.equal(moving, parameter(6, 4))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, cls([parameter(2, 2)]).defaults["lr"]]


@built_in_optimizers
def test_weight_decay_is_of_its_group(cls):
    decayed, plain = parameter(6, 4), parameter(6, 4)
    optimizer = cls([{"params": [decayed], "weight_decay": 0.9}, {"params": [plain], "weight_decay": 0.0}], lr=0.05)
    for seed in range(5):
        decayed.grad = plain.grad = randn(6, 4, seed=seed)
        optimizer.step()
    assert decayed.norm() < plain.norm()


# --- gradients ------------------------------------------------------------------------------------


@all_optimizers
@all_dtypes
def test_a_step_without_gradients_changes_nothing(cls, dtype):
    optimizer = run(build(cls, dtype), 0)
    before = copy.deepcopy((parameters(optimizer), optimizer.state_dict()))
    optimizer.zero_grad()
    optimizer.step()
    assert_same((parameters(optimizer), optimizer.state_dict()["state"]), (before[0], before[1]["state"]))


@all_optimizers
@all_dtypes
def test_gradients_of_zero_leave_a_fresh_optimizer_without_decay_where_it_was(cls, dtype):
    optimizer = build(cls, dtype, **taken(cls, {"weight_decay": 0.0}))
    before = copy.deepcopy(parameters(optimizer))
    for p in parameters(optimizer):
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert_same(parameters(optimizer), before)


@built_in_optimizers
def test_gradients_of_zero_decay_by_the_step_size(cls):
    hyper = {"decay": "lr"} if cls in (NAMO, NAMOD) else {}  # their adaptive step, and its decay, are zero then
    p = parameter(4, 3)
    optimizer = cls([p], lr=0.1, weight_decay=0.5, **hyper)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), 0.95 * parameter(4, 3).detach())


@all_optimizers
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_parameters_without_elements_are_stepped_beside_others(cls, shape):
    (p, empty), alone = (parameter(6, 4), parameter(*shape)), parameter(6, 4)
    for optimizer in (cls([empty, p]), cls([alone])):
        for seed in (1, 2):
            empty.grad = torch.zeros_like(empty)
            p.grad = alone.grad = randn(6, 4, seed=seed)
            optimizer.step()
    assert_same(p, alone)


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_of_adamw_trains_as_its_real_view(cls, dtype):
    whole = parameter(5, 2, dtype=dtype)
    real = nn.Parameter(torch.view_as_real(whole.detach()).clone())
    for p in (whole, real):
        optimizer = cls([{"params": [parameter(3, 3)]}, {"params": [p], "orthogonalize": False}], lr=0.1)
        for seed in range(4):
            grad = randn(5, 2, seed=seed, dtype=dtype)
            p.grad = grad if p.is_complex() else torch.view_as_real(grad).clone()
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), real.detach())


@all_optimizers
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_torchs(cls, set_to_none):
    optimizer = run(build(cls), 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in parameters(optimizer):
        assert (p.grad is None) if set_to_none else not p.grad.any()


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(cls, dtype):
    usual = run(build_groups(cls), 0, 1)
    set_before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        other = run(build_groups(cls), 0, 1)
    finally:
        torch.set_default_dtype(set_before)
    assert_same_run(other, usual)


@all_optimizers
def test_deterministic_algorithms_change_nothing(cls):
    usual = run(build_groups(cls), 0, 1)
    try:
        torch.use_deterministic_algorithms(True)
        other = run(build_groups(cls), 0, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(other, usual)


# --- closures and the hooks of a step -------------------------------------------------------------


@all_optimizers
@all_dtypes
def test_a_step_calls_its_closure_once(cls, dtype):
    optimizer, calls = build(cls, dtype), []
    evaluate = closure_of(optimizer)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return evaluate()

    for _ in range(3):
        optimizer.step(closure=closure)
    assert calls == [True] * 3


@all_optimizers
def test_hooks_of_a_step_run_in_torchs_order(cls):
    optimizer, seen = build(cls), []
    closure = closure_of(optimizer)
    before = copy.deepcopy(parameters(optimizer))

    def note(name: str) -> Callable:
        def hook(given: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            moved = not torch.equal(parameters(given)[0], before[0])
            seen.append((name, given is optimizer, args[-1] is closure, moved))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("all pre")),
        register_optimizer_step_post_hook(note("all post")),
    ]
    optimizer.step(closure)
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    assert seen == [
        ("all pre", True, True, False),
        ("pre", True, True, False),
        ("post", True, True, True),
        ("all post", True, True, True),
    ]


@all_optimizers
def test_a_pre_hook_may_replace_the_arguments_of_a_step(cls):
    optimizer, expected = build(cls), build(cls)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": closure_of(o)}))
    assert_same(optimizer.step(), expected.step(closure_of(expected)))
    assert_same_run(optimizer, expected)


@all_optimizers
def test_matrices_may_be_stepped_within_the_backward_pass(cls):
    x = randn(3, 4)
    usual, fused = ([parameter(5, 4, seed=1), parameter(6, 5, seed=2)] for _ in range(2))
    together = cls(usual)
    alone = {p: cls([p]) for p in fused}

    def step(p: Tensor) -> None:
        alone[p].step()
        alone[p].zero_grad()

    for p in fused:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        for first, second in (usual, fused):
            ((x @ first.T) @ second.T).square().sum().backward()
        together.step()
        together.zero_grad()
    assert_same(fused, usual)
    assert all(p.grad is None for p in fused)


@all_optimizers
def test_the_profiler_sees_a_step_by_its_class(cls):
    optimizer = build(cls)
    set_gradients(optimizer, 0)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{cls.__name__}.step" in {event.name for event in profile.function_events}


# --- copies and state dicts -----------------------------------------------------------------------


def saved_whole(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@all_optimizers
@dtypes_and_tensor_lr
@pytest.mark.parametrize("copied", [*COPIES, pytest.param(saved_whole, id="save")])
def test_a_copy_goes_on_identically_in_every_dtype(cls, dtype, copied, tensor_lr):
    optimizer = run(build(cls, dtype, lr=torch.tensor(0.02) if tensor_lr else 0.02), 0, 1)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("hooks stay with the original"))
    twin = copied(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(twin, 5, 6)
    optimizer._optimizer_step_post_hooks.clear()
    assert_same_run(twin, run(optimizer, 5, 6))


@all_optimizers
@dtypes_and_tensor_lr
def test_state_dicts_are_deterministic_and_go_on_identically(cls, dtype, tensor_lr):
    def fresh() -> torch.optim.Optimizer:
        return build(cls, dtype, lr=torch.tensor(0.02) if tensor_lr else 0.02)

    optimizer, other = run(fresh(), 0, 1), fresh()
    assert all(optimizer.state[p] for p in parameters(optimizer))
    for p, q in zip(parameters(other), parameters(optimizer), strict=True):
        p.data.copy_(q.detach())
    state_dict = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(through_a_file(state_dict))
    assert_same(state_dict["state"], optimizer.state_dict()["state"])  # loading changed nothing of it
    for seed in (2, 3):
        assert_same_run(run(other, seed), run(optimizer, seed))
    assert_same(optimizer.state_dict()["state"], other.state_dict()["state"])

    # as in torch's suite: groups that are there twice have one representation
    other.param_groups.extend(other.param_groups)
    assert other.state_dict()["param_groups"][-1] == optimizer.state_dict()["param_groups"][-1]


@all_optimizers
@pytest.mark.parametrize("missing", [["momentum_dtype"], ["momentum_dtype", "transposed", "blocks", "name"]])
def test_an_older_state_dict_loads(cls, missing):
    optimizer, other = run(build_groups(cls), 0), run(build_groups(cls), 0)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for key in missing:
            group.pop(key, None)
    other.load_state_dict(state_dict)
    assert_same_run(run(other, 1), run(optimizer, 1))


@all_optimizers
def test_loading_keeps_no_reference_to_the_given_state_dict(cls):
    optimizer, other = run(build(cls), 0), build(cls)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    other.param_groups[0]["lr"] = 0.7
    assert optimizer.param_groups[0]["lr"] == kept["param_groups"][0]["lr"]
    assert state_dict["param_groups"] == kept["param_groups"]


def order_of_hooks(register: Callable, call: Callable[[], object]) -> list[str]:
    seen: list[str] = []
    handles = [
        register(lambda *_: seen.append("first")),
        register(lambda *_: seen.append("second")),
        register(lambda *_: seen.append("prepended"), prepend=True),
    ]
    call()
    for handle in handles:
        handle.remove()
    call()
    return seen


@all_optimizers
@pytest.mark.parametrize("kind", ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"])
def test_hooks_of_state_dicts_run_once_in_order_until_they_are_removed(cls, kind):
    optimizer = run(build(cls), 0)
    state_dict = optimizer.state_dict()
    call = (lambda: optimizer.load_state_dict(state_dict)) if kind.startswith("load") else optimizer.state_dict
    assert order_of_hooks(getattr(optimizer, f"register_{kind}_hook"), call) == ["prepended", "first", "second"]


@all_optimizers
def test_hooks_of_state_dict_may_change_what_is_saved(cls):
    optimizer = run(build(cls), 0)
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: state_dict.update(note="in place"))
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
    assert optimizer.state_dict()["note"] == "in place"
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {"inner": state_dict})
    assert optimizer.state_dict()["inner"]["note"] == "in place"


@all_optimizers
def test_a_load_hook_gets_a_shallow_copy_of_the_users_state_dict(cls):
    given, seen = {**run(build(cls), 0).state_dict(), "note": "mine"}, []
    optimizer = build(cls)
    optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: seen.append((o, state_dict, dict(state_dict))))
    optimizer.load_state_dict(given)
    ((owner, passed, content),) = seen
    assert owner is optimizer
    assert passed is not given
    assert set(content) == {"state", "param_groups", "note"}
    assert content["state"] is given["state"]
    assert content["param_groups"] is given["param_groups"]


@all_optimizers
@pytest.mark.parametrize(
    "hook",
    [lambda o, given: given["wrapped"], lambda o, given: given.update(given.pop("wrapped"))],
    ids=["new", "same"],
)
def test_a_load_hook_may_change_the_state_dict_or_give_another(cls, hook):
    trained, optimizer = run(build(cls), 0), build(cls)
    optimizer.register_load_state_dict_pre_hook(hook)
    given = {"wrapped": trained.state_dict()}
    optimizer.load_state_dict(given)  # no state dict of an optimizer until the hook has run
    assert_same(optimizer, trained)
    assert set(given) == {"wrapped"}


@all_optimizers
def test_a_load_hook_may_add_what_a_checkpoint_lacks(cls):
    trained, optimizer = run(build(cls), 0), build(cls)
    state_dict = copy.deepcopy(trained.state_dict())
    for group in state_dict["param_groups"]:
        del group["weight_decay"]
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.load_state_dict(state_dict)

    def add(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
        return {**state_dict, "param_groups": [{"weight_decay": own["weight_decay"], **g} for g, own in groups]}

    optimizer.register_load_state_dict_pre_hook(add)
    optimizer.load_state_dict(state_dict)
    assert_same(optimizer, trained)


@all_optimizers
def test_a_post_load_hook_sees_the_loaded_state(cls):
    trained, optimizer, seen = run(build(cls, torch.bfloat16), 0), build(cls, torch.bfloat16), []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(copy.deepcopy(o.state_dict())))
    optimizer.load_state_dict(trained.state_dict())
    (state_dict,) = seen
    assert_same(state_dict["state"], trained.state_dict()["state"])  # in its dtypes, which are not the parameter's
    assert state_dict["param_groups"] == trained.state_dict()["param_groups"]


# --- cleared and given state ----------------------------------------------------------------------


def reset_by_clear(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def reset_each(optimizer: torch.optim.Optimizer) -> None:
    for p in parameters(optimizer):
        optimizer.state[p].clear()


def reset_by_replacement(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def at_weights_of(optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for p, q in zip(parameters(fresh), parameters(optimizer), strict=True):
        p.data.copy_(q.detach())
    return fresh


@all_optimizers
@pytest.mark.parametrize("reset", [reset_by_clear, reset_each, reset_by_replacement])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_whose_state_was_cleared_begins_anew(cls, reset, steps):
    optimizer = run(build_groups(cls), *range(steps))
    fresh = at_weights_of(optimizer, build_groups(cls))
    reset(optimizer)
    assert optimizer.skipped_steps() == 0
    assert_same_run(run(optimizer, 5, 6), run(fresh, 5, 6))


@all_optimizers
def test_cleared_state_is_saved_and_loaded_as_fresh_state(cls):
    optimizer = run(build_groups(cls), 0, 1)
    optimizer.state.clear()
    assert_same(optimizer, build_groups(cls))
    other = at_weights_of(optimizer, run(build_groups(cls), 3))
    other.load_state_dict(optimizer.state_dict())
    other.state.clear()
    other.load_state_dict(run(build_groups(cls), 0).state_dict())
    assert_same(other, run(build_groups(cls), 0))


@all_optimizers
@pytest.mark.parametrize(("index", "delete"), [(0, True), (2, False), (3, True), (4, False)])
def test_one_parameter_may_begin_anew(cls, index, delete):
    optimizer, expected = run(build_groups(cls), 0, 1), run(build_groups(cls), 0, 1)
    p, q = parameters(optimizer)[index], parameters(expected)[index]
    if delete:
        del optimizer.state[p]
    else:
        optimizer.state[p].clear()
    for value in expected.state[q].values():
        value.zero_()
    assert_same_run(run(optimizer, 2, 3), run(expected, 2, 3))


@all_optimizers
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("keep_state", [False, True])
def test_a_parameter_may_be_exchanged_within_its_group(cls, index, keep_state):
    """Models that grow while they train exchange a parameter, and often hand its state on."""
    optimizer, expected = run(build(cls), 0), run(build(cls), 0)
    old = optimizer.param_groups[index]["params"][0]
    new = nn.Parameter(old.detach().clone())
    optimizer.param_groups[index]["params"][0] = new
    state = optimizer.state.pop(old)
    if keep_state:
        optimizer.state[new] = state
    else:
        del expected.state[parameters(expected)[index]]
    before = old.detach().clone()
    assert_same_run(run(optimizer, 1, 2), run(expected, 1, 2))
    assert_same(old.detach(), before)


ADDED = ("momentum_dtype", "transposed", "blocks")


@all_optimizers
@pytest.mark.parametrize("steps", [0, 2])
def test_setstate_takes_what_getstate_gives(cls, steps):
    optimizer, expected = run(build_groups(cls), *range(steps)), run(build_groups(cls), *range(steps))
    optimizer.bucket_bytes = 100
    optimizer.__setstate__(optimizer.__getstate__())
    assert optimizer.bucket_bytes == 100
    assert_same_run(run(optimizer, 5), run(expected, 5))


@all_optimizers
def test_setstate_takes_groups_and_state_alone(cls):
    """This is how torch's load_state_dict calls it."""
    source, optimizer = run(build_groups(cls), 0, 1), run(build_groups(cls, lr=0.5), 7)
    optimizer.__setstate__({"state": source.state, "param_groups": source.param_groups})
    expected = run(build_groups(cls), 0, 1, 2)
    assert_same_run(run(optimizer, 2), expected)
    assert_same([p.detach() for p in parameters(source)], [p.detach() for p in parameters(expected)])


def without(keys: tuple[str, ...], groups: list[dict]) -> list[dict]:
    return [{key: value for key, value in group.items() if key not in keys} for group in groups]


@all_optimizers
@pytest.mark.parametrize("given", ["whole", "older", "torchs"])
def test_setstate_serves_a_new_instance(cls, given):
    hyper = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.8, "adamw_lr": 0.004, "adamw_betas": (0.8, 0.9)}
    optimizer, expected = (run(cls([parameter(6, 4)], **taken(cls, hyper)), 0, 1) for _ in range(2))
    for each in (optimizer, expected):
        each.add_param_group({"params": [parameter(5)], "orthogonalize": False})
    expected = copy.deepcopy(expected)  # torch adds a key to the defaults of copies
    state = optimizer.__getstate__()
    if given == "older":
        state["param_groups"] = without(ADDED, state["param_groups"])
        state["_matrix_defaults"] = without(ADDED, [state["_matrix_defaults"]])[0]
    if given == "torchs":
        state = {key: state[key] for key in ("defaults", "state", "param_groups")}
    twin = cls.__new__(cls)
    twin.__setstate__(state)
    for each in (twin, expected):
        run(each, 2)
        each.add_param_group({"params": [parameter(4, 4)]})
        each.add_param_group({"params": [parameter(4)], "orthogonalize": False})
    assert_same_run(run(twin, 3), run(expected, 3))
    twin.load_state_dict(expected.state_dict())
    assert_same(copy.deepcopy(twin), expected)


@all_optimizers
def test_an_older_pickle_goes_on(cls):
    class Older(cls):
        def __getstate__(self) -> dict:
            state = super().__getstate__()
            state["param_groups"] = without(ADDED, state["param_groups"])
            return {key: value for key, value in state.items() if key in ("defaults", "state", "param_groups")}

    optimizer = Older([parameter(6, 4), parameter(5, 5)])
    twin = copy.deepcopy(run(optimizer, 0, 1))
    assert_same_run(run(twin, 2), run(optimizer, 2))


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@all_optimizers
def test_a_compiled_step_is_the_eager_one(cls):
    compiled, eager = build_groups(cls, lr=0.1), build_groups(cls, lr=0.1)
    advance = [S.StepLR(o, 1, gamma=0.5).step for o in (compiled, eager)]
    step = torch.compile(compiled.step, backend="aot_eager")
    for seed in range(4):
        for optimizer, do in ((compiled, step), (eager, eager.step)):
            set_gradients(optimizer, seed)
            assert do() is None
        for do in advance:
            do()
    assert_same_run(compiled, eager)


def test_a_torch_that_unwraps_a_disabled_method_from_its_object_cannot(monkeypatch):
    """What torch 2.10 marks is stood in for; on it the test above is the real one."""

    def disable(function, reason):
        marked = types.FunctionType(function.__code__, globals())
        marked._torchdynamo_orig_callable = function  # what its torch.compile would call, without self
        return marked

    monkeypatch.setattr(torch.compiler, "disable", disable)
    assert not hasattr(eagerly(reason="")(lambda self: None), "_torchdynamo_orig_callable")


def trainer_of(cls: type, closure: bool = False) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = build_optimizer(module, cls, lr=0.05)

    def train(x: Tensor) -> Tensor:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            return loss

        if closure:
            return optimizer.step(evaluate)
        loss = evaluate()
        optimizer.step()
        return loss.detach()

    return module, train


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("cls", "closure"), [(NAMO, False), *((cls, True) for cls in OPTIMIZERS)])
def test_a_compiled_training_step_is_the_eager_one(cls, closure):
    (module, train), (other, eager) = trainer_of(cls, closure), trainer_of(cls, closure)
    compiled = torch.compile(train, backend="eager")
    for seed in range(3):
        assert_same(compiled(randn(5, 4, seed=seed)).detach(), eager(randn(5, 4, seed=seed)).detach())
    assert_same(module, other)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@torch._inductor.config.patch(compile_threads=1)  # starts no pool of processes
def test_a_training_step_compiled_by_the_default_backend_is_near_the_eager_one():
    modules = []
    for compile_or_not in (torch.compile, lambda function: function):
        module = nn.Linear(4, 6, bias=False)
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
        optimizer = NAMO([module.weight], lr=0.05)

        def train(x: Tensor) -> None:
            optimizer.zero_grad()  # noqa: B023
            module(x).square().mean().backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        train = compile_or_not(train)
        for seed in range(2):
            train(randn(5, 4, seed=seed))
        modules.append(module)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("compiler")
@all_optimizers
def test_a_model_that_the_closure_calls_stays_compiled(cls):
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = nn.Linear(4, 6, bias=False)
    compiled, optimizer = torch.compile(model, backend=backend), cls([model.weight])
    optimizer.step(lambda: compiled(randn(5, 4)).square().sum().backward())
    assert len(graphs) == 1


@pytest.mark.usefixtures("compiler")
def test_a_step_in_a_full_graph_is_refused_with_the_reason():
    optimizer = build(NAMO)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"lightning_namo's step runs eagerly"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


# --- beside torch's other tools -------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("overflow", [False, True])
def test_a_gradient_scaler_unscales_skips_and_goes_on(cls, overflow):
    scaled, plain = build(cls), build(cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    closure, x = closure_of(plain), 0.3 * randn(5, seed=3)
    for step in range(4):
        weight, bias = parameters(scaled)
        scaled.zero_grad()
        scaler.scale((weight.mv(x) + bias).square().sum()).backward()
        bad = overflow and step == 1
        if bad:
            weight.grad[0, 0] = torch.inf
        scaler.step(scaled)
        scaler.update()
        if not bad:
            plain.step(closure)
    assert scaler.get_scale() == (2.0**7 if overflow else 2.0**8)
    assert scaled.skipped_steps() == 0
    assert_same_run(scaled, plain)


@all_optimizers
@pytest.mark.parametrize("ema", [False, True])
def test_weights_are_averaged_while_they_train(cls, ema):
    (module, train), x = trainer_of(cls), randn(5, 4)
    average = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5) if ema else None)
    expected = None
    for step in range(3):
        train(x)
        average.update_parameters(module)
        now = [p.detach().clone() for p in module.parameters()]
        weight = (0.5 if ema else 1 / (step + 1)) if expected else 1.0
        expected = [torch.lerp(old, new, weight) for old, new in zip(expected or now, now, strict=True)]
    torch.testing.assert_close([p.detach() for p in average.module.parameters()], expected)


@all_optimizers
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipped_gradients_are_what_is_stepped(cls, clip):
    clipped, given = build_groups(cls), build_groups(cls)
    for seed in range(2):
        set_gradients(clipped, seed)
        clip(parameters(clipped), 0.1)
        for p, q in zip(parameters(clipped), parameters(given), strict=True):
            q.grad = p.grad.clone()
        clipped.step()
        given.step()
    assert_same_run(clipped, given)


@all_optimizers
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_closure_may_recompute_activations(cls, reentrant):
    runs = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer, x = build_optimizer(module, cls, lr=0.05), randn(5, 4).requires_grad_()

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            y = checkpoint(module, x, use_reentrant=reentrant) if recomputed else module(x)  # noqa: B023
            loss = y.square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            with torch.no_grad() if recomputed else nullcontext():
                optimizer.step(closure)
        runs.append(module)
    assert_same(*runs)


@all_optimizers
def test_an_optimizer_is_sent_to_another_process_and_back(cls):
    """multiprocessing pickles with hooks of its own, and torch calls __setstate__ for it."""
    optimizer = run(build_groups(cls), 0)
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(optimizer, protocol=2)), protocol=5))
    assert_same_run(run(twin, 1), run(optimizer, 1))
