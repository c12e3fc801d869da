"""The state of an optimizer: complete, plain, copied, loaded, cast with its module, and refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, build_optimizer, split_parameters
from tests.helpers.optimizers import (
    COPIES,
    Fused,
    all_optimizers,
    assert_same_run,
    build,
    parameter,
    parameters,
    refused,
    run,
    snapshot,
    through_a_file,
)
from tests.helpers.toy import assert_same


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_float32_at_least(cls, dtype):
    for state in run(build(cls, dtype), 0, 1).state.values():
        kinds = {key: value.dtype for key, value in state.items()}
        assert kinds.pop("step") == (torch.float64 if dtype == torch.float64 and "skipped" in kinds else torch.float32)
        for key in ("skipped", "v", "radius"):
            assert kinds.pop(key, torch.promote_types(dtype, torch.float32)) == torch.promote_types(
                dtype, torch.float32
            )
        assert set(kinds.values()) == {dtype}


@all_optimizers
def test_memory_is_given_back_with_the_last_reference(cls):
    optimizer = build_optimizer(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), cls)
    run(optimizer, 0, 1)
    momentum = weakref.ref(optimizer.state[parameters(optimizer)[0]]["momentum_buffer"])
    gc.collect()
    gc.disable()  # what is in a cycle would stay until the next collection
    try:
        del optimizer
        assert momentum() is None
    finally:
        gc.enable()


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
    for p, state in cast.state.items():
        assert {key: value.dtype for key, value in state.items()} == {
            key: value.dtype for key, value in fresh.state[p].items()
        }
    tolerance = 1000 * torch.finfo(dtype).eps
    expected = [p.to(dtype) for p in modules[1].parameters()]
    torch.testing.assert_close(list(modules[0].parameters()), expected, rtol=tolerance, atol=tolerance)


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
