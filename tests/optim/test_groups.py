"""Parameter groups: what they take, how they are added and named, and the hyper-parameters that are refused."""

import copy
from collections.abc import Iterator
from math import inf, nan

import numpy
import pytest
import torch
from jsonargparse.typing import NonNegativeFloat
from torch import nn

from lightning_namo import NAMO, NAMOD, AdaMuon, WarmupStableDecay, split_parameters
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from tests.helpers.optimizers import (
    Fused,
    all_optimizers,
    assert_same_run,
    build,
    parameter,
    parameters,
    randn,
    refused,
    run,
    through_a_file,
)
from tests.helpers.rules import BUILT_IN
from tests.helpers.toy import assert_same


def late_module() -> tuple[nn.Module, OrthogonalizedOptimizer]:
    """A module of two layers and an optimizer that was built while the second was frozen."""
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[1].requires_grad_(False)
    optimizer = NAMO(split_parameters(module, heads="matrix"), lr=0.1, adamw_lr=0.01)
    module[1].requires_grad_(True)
    return module, optimizer


@all_optimizers
def test_the_adamw_learning_rate_is_the_matrices_unless_given(cls):
    assert build(cls, lr=0.123).param_groups[2]["lr"] == 0.123
    assert build(cls, lr=0.123, adamw_lr=0.5).param_groups[2]["lr"] == 0.5


@all_optimizers
@pytest.mark.parametrize("number", [numpy.float64, NonNegativeFloat], ids=["numpy", "command line"])
def test_numbers_of_other_types_become_plain(cls, number):
    optimizer = build(cls, lr=number(0.02), momentum=number(0.5), adamw_betas=(number(0.8), number(0.9)))
    optimizer.add_param_group({"params": [parameter(3, 3)], "lr": number(0.03), "weight_decay": number(0.3)})
    groups = through_a_file(optimizer.state_dict())["param_groups"]
    assert [group["lr"] for group in groups] == [0.02] * 4 + [0.03]
    assert {type(value) for group in groups for value in group.values()} <= {bool, int, float, str, list, type(None)}


@pytest.mark.parametrize("steps", [0, 3, 9])
def test_a_group_added_during_warm_up_ends_at_the_learning_rate_of_the_others(steps):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    optimizer = NAMO(split_parameters(module, heads="matrix"), lr=0.01, adamw_lr=0.002)
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


def test_a_copy_routes_new_parameters_as_the_original():
    module = Fused()
    module.up.requires_grad_(False)
    twin, module = copy.deepcopy((NAMO(split_parameters(module)), module))
    twin.add_param_group({"params": list(module.up.requires_grad_(True).parameters())})
    assert [group["name"] for group in twin.param_groups[2:]] == ["adamw_2", "matrices_transposed"]


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


def test_parameters_added_later_are_routed_as_the_module_was():
    module, optimizer = late_module()
    optimizer.add_param_group({"params": list(module[1].parameters()), "lr": 0.05})
    adamw, matrices = optimizer.param_groups[2:]  # BackboneFinetuning drives the last group's lr
    assert (matrices["params"], matrices["name"], matrices["lr"]) == ([module[1].weight], "matrices_2", 0.05)
    assert (adamw["params"], adamw["name"], adamw["lr"]) == ([module[1].bias], "adamw_2", pytest.approx(0.005))
    assert matrices["param_names"] == ["1.weight"]
    assert [matrices["orthogonalize"], adamw["orthogonalize"]] == [True, False]


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
    with refused(r"real matrices.*complex64.*orthogonalize=False"):
        cls([parameter(3, 3, dtype=torch.complex64)])


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


OUT_OF_RANGE_BY_CLASS = [(cls, key, value) for cls in BUILT_IN for key, value in OUT_OF_RANGE]


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
    with refused(rf"{cls.__name__}: expected adamw_{key}"):
        build(cls, **{f"adamw_{key}": value})


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
