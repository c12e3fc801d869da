"""What the four optimizers promise beside their formulas: closures, groups, state, gradients that are not finite."""

import copy
import inspect
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from tests.helpers.optimizers import (
    OPTIMIZERS,
    all_optimizers,
    assert_same_run,
    build,
    parameter,
    parameters,
    randn,
    refused,
    run,
    set_gradients,
    snapshot,
)
from tests.helpers.rules import BUILT_IN
from tests.helpers.toy import assert_same


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a value on the device."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **kwargs or {})


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
    [(cls, key) for cls in BUILT_IN for key in CHANGES if key in cls([parameter(2, 2)]).param_groups[0]],
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


@all_optimizers
def test_small_buckets_change_nothing(cls):
    small = build(cls)
    small.bucket_bytes = 1
    assert_same_run(run(small, 0, 1), run(build(cls), 0, 1))


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
