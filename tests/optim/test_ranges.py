"""Wrong hyper-parameters and group keys are refused in words, wherever they come from; right ones are taken."""

from __future__ import annotations

import copy
import inspect
from math import inf, nan
from typing import Any, ClassVar

import numpy
import pytest
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, build_optimizer, split_parameters
from lightning_namo.arguments import UNIT as UNIT_RANGE
from lightning_namo.arguments import Range
from lightning_namo.optim import OrthogonalizedOptimizer
from lightning_namo.optim.groups import ENGINE_KEYS
from tests.helpers.optimizers import refused
from tests.helpers.rules import BUILT_IN

all_optimizers = pytest.mark.parametrize("cls", BUILT_IN)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def matrix_group(**keys: Any) -> dict[str, Any]:
    return {"params": [parameter(3, 3)], **keys}


def adamw_group(**keys: Any) -> dict[str, Any]:
    return {"params": [parameter(3)], "orthogonalize": False, **keys}


NUMBER = [True, "0.1", inf, -inf, nan, -0.5, None, [0.1], torch.ones(2), 1j]
UNIT = [*NUMBER, 1.0, 2, torch.tensor(0.5)]
COUNT = [True, "5", 2.5, 0, -1, None, inf]
WRONG: dict[str, list[Any]] = {
    "lr": NUMBER,
    "weight_decay": NUMBER,
    "momentum": UNIT,
    "nesterov": ["no", "False", 1, 0, None],
    "ns_steps": COUNT,
    "ns_coefficients": [None, 5, True, (True, True, True), ("a", "b", "c"), "cubic", (1.0, inf, 1.0), {}],
    "orthogonalizer": [None, True, "qr", ["svd"]],
    "shape_scale": [True, "0.2", inf, nan, 0.0, -1.0],
    "momentum_dtype": [True, torch.float32, "float16", ["float32"]],
}
OF_SOME = {"beta2": UNIT, "eps": [*NUMBER, torch.tensor(0.5)]}
ADAPTIVE = {"max_step": [True, "1", inf, nan, 0.0, -1.0], "decay": [None, True, "no", ["lr"]]}
CASES = [(cls, key, value) for cls in BUILT_IN for key, values in WRONG.items() for value in values]
CASES += [(cls, key, value) for cls in (NAMO, NAMOD, AdaMuon) for key, values in OF_SOME.items() for value in values]
CASES += [(cls, key, value) for cls in (NAMO, NAMOD) for key, values in ADAPTIVE.items() for value in values]
CASES += [(NAMOD, "clamp", value) for value in ("0.1", True, inf, nan, -0.1, 1.5, [0.1])]


def named(case: Any) -> str:
    return case.__name__ if isinstance(case, type) else str(case).replace("\n", "")


@pytest.mark.parametrize(("cls", "key", "value"), CASES, ids=named)
def test_a_wrong_hyper_parameter_of_matrices_is_refused_by_name(cls, key, value):
    message = rf"^{cls.__name__}: expected {key} to be .* but got "
    with refused(message):
        cls([parameter(3, 3)], **{key: value})
    with refused(message):
        cls([matrix_group(**{key: value})])
    optimizer = cls([parameter(3, 3)])
    with refused(message):
        optimizer.add_param_group(matrix_group(**{key: value}))
    assert len(optimizer.param_groups) == 1
    if isinstance(value, Tensor):
        return
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with refused(rf"{message}.* That is of group 'matrices'.*Nothing was loaded"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("cls", "key", "value"), [(NAMO, "lr", "1e-3"), (NAMOD, "clamp", "0.1"), (Muon, "momentum", 2)]
)
def test_a_wrong_default_is_refused_although_every_group_has_its_own(cls, key, value):
    right = {"lr": 0.1, "clamp": 0.1, "momentum": 0.5}[key]
    with refused(rf"^{cls.__name__}: expected {key} to be "):
        cls([matrix_group(**{key: right})], **{key: value})


def test_defaults_that_only_the_groups_make_right_are_taken():
    assert NAMO([matrix_group(momentum=0.5)], beta2=0.5).param_groups[0]["beta2"] == 0.5


WRONG_BETAS = [
    (0.9,),
    (0.9, 0.95, 0.99),
    0.9,
    None,
    "ab",
    (0.9, True),
    (0.9, "0.95"),
    (nan, 0.9),
    (0.9, inf),
    (1.0, 0.9),
]
WRONG_OF_ADAMW = [("betas", value) for value in WRONG_BETAS]
WRONG_OF_ADAMW += [("lr", value) for value in NUMBER if value is not None]
WRONG_OF_ADAMW += [("weight_decay", value) for value in NUMBER]
WRONG_OF_ADAMW += [("eps", value) for value in (*NUMBER, torch.tensor(0.5))]


@all_optimizers
@pytest.mark.parametrize(("key", "value"), WRONG_OF_ADAMW, ids=named)
def test_a_wrong_hyper_parameter_of_adamw_is_refused_by_name(cls, key, value):
    message = rf"^AdamW: expected {key}.* to be .* but got "
    with refused(rf"^{cls.__name__}: expected adamw_{key} to be .* but got "):
        cls([parameter(3, 3)], **{f"adamw_{key}": value})
    with refused(message):
        cls([parameter(3, 3)]).add_param_group(adamw_group(**{key: value}))
    if key == "betas" or isinstance(value, Tensor):
        return
    optimizer = cls([matrix_group(), adamw_group()])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][key] = value
    with refused(rf"{message}.* That is of group 'adamw'.*Nothing was loaded"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("key", "name"), [("momentum", r"betas\[0\]"), ("beta2", r"betas\[1\]")])
@pytest.mark.parametrize("value", UNIT, ids=named)
def test_adamws_betas_one_by_one(key, name, value):
    with refused(rf"^AdamW: expected {name} to be in \[0, 1\) but got "):
        NAMO([matrix_group(), adamw_group(**{key: value})])


def test_betas_beside_one_of_them_are_refused():
    with refused(r"^AdamW: expected betas, or momentum and beta2, but got both"):
        NAMO([matrix_group(), adamw_group(betas=(0.9, 0.95), momentum=0.8)])


# --- what a group says of its matrices --------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transposed", "no"),
        ("transposed", 1),
        ("transposed", None),
        ("blocks", True),
        ("blocks", "3"),
        ("blocks", 1.5),
        ("blocks", None),
        ("blocks", [1, "2"]),
        ("blocks", [True, 2]),
        ("blocks", {1, 2}),
        ("name", 3),
        ("name", None),
    ],
)
def test_a_wrong_key_of_structure_is_refused_by_name(key, value):
    with refused(rf"^NAMO: expected {key} to be .* but got "):
        NAMO([matrix_group(**{key: value})])


@pytest.mark.parametrize("value", ["no", 0, 1, None, "False"])
def test_orthogonalize_is_true_or_false(value):
    with refused(r"^NAMO: expected orthogonalize to be True or False but got "):
        NAMO([matrix_group(), matrix_group(orthogonalize=value)])


# --- keys that do not exist -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("weigth_decay", "weight_decay"), ("momentun", "momentum"), ("ns_step", "ns_steps"), ("LR", "lr")],
)
def test_a_misspelt_key_is_refused_with_the_nearest(key, nearest):
    for build in (NAMO, NAMO([parameter(3, 3)]).add_param_group):
        group = matrix_group(**{key: 0.1})
        with refused(rf"^NAMO: expected a group of matrices to have keys that it knows, but got '{key}'.*'{nearest}'"):
            build([group] if build is NAMO else group)


def test_a_misspelt_key_of_adamw_is_refused_with_the_nearest():
    with refused(r"^AdamW: expected a group of AdamW to have keys that it knows, but got 'beta'.*'betas'"):
        NAMO([matrix_group(), adamw_group(beta=(0.9, 0.95))])


def test_the_message_tells_how_to_keep_notes_in_a_group():
    optimizer = NAMO([parameter(3, 3)])
    with refused(r"'lr_scale'.*optimizer\.param_groups"):
        optimizer.add_param_group(matrix_group(lr_scale=0.5))
    optimizer.param_groups[0]["lr_scale"] = 0.5
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


@pytest.mark.parametrize("group", [matrix_group, adamw_group])
@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_key_of_the_constructor_is_refused_with_the_one_of_a_group(group, key):
    with refused(rf"'adamw_{key}'.*{key} of a group with orthogonalize=False"):
        NAMO([matrix_group(), group(**{f"adamw_{key}": 0.1})])


@pytest.mark.parametrize(("cls", "key"), [(NAMO, "clamp"), (Muon, "beta2"), (Muon, "max_step"), (AdaMuon, "decay")])
def test_a_key_of_another_algorithm_is_refused(cls, key):
    with refused(rf"^{cls.__name__}: expected a group of matrices to have keys that it knows, but got '{key}'"):
        cls([matrix_group(**{key: 0.1})])


def test_keys_of_the_other_kind_of_group_are_refused():
    with refused(r"^NAMO: .* but got 'betas'.*AdamW"):
        NAMO([matrix_group(betas=(0.9, 0.95))])
    with refused(r"^AdamW: .* but got 'ns_steps'.*matrices"):
        NAMO([matrix_group(), adamw_group(ns_steps=3)])


SWITCHES = ["maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"]


@pytest.mark.parametrize("group", [matrix_group, adamw_group])
@pytest.mark.parametrize("key", SWITCHES)
def test_torchs_switches_are_refused_unless_they_are_off(group, key):
    with refused(rf"expected {key} to be False or None \(it is not supported\) but got True"):
        NAMO([matrix_group(), group(**{key: True})])
    NAMO([matrix_group(), group(**{key: False}), group(**{key: None})])


def test_a_switch_that_a_checkpoint_has_on_is_refused():
    optimizer = NAMO([parameter(3, 3)])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["maximize"] = True
    with refused(r"expected maximize to be False or None.*Nothing was loaded"):
        optimizer.load_state_dict(saved)


# --- what stays right -------------------------------------------------------------------------------


def test_the_groups_of_an_optimizer_build_another_one():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    first = build_optimizer(module, NAMO, lr=0.02)
    torch.optim.lr_scheduler.OneCycleLR(first, max_lr=0.1, total_steps=10)
    torch.optim.swa_utils.SWALR(first, swa_lr=0.05)
    second = NAMO([dict(group) for group in first.param_groups])
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]


def test_the_groups_of_torchs_adamw_become_groups_of_ours():
    theirs = torch.optim.AdamW([parameter(3)], lr=0.3, betas=(0.8, 0.9)).param_groups[0]
    optimizer = NAMO([matrix_group(), {**theirs, "orthogonalize": False}])
    assert [optimizer.param_groups[1][key] for key in ("lr", "momentum", "beta2")] == [0.3, 0.8, 0.9]


@pytest.mark.parametrize("value", [torch.tensor(0.02), torch.tensor([0.02]), torch.tensor(1), numpy.float32(0.5), 1])
def test_learning_rate_and_decay_take_numbers_and_tensors_of_one_element(value):
    optimizer = NAMO([matrix_group(lr=value, weight_decay=value), adamw_group(lr=value)], lr=value, weight_decay=value)
    assert all(float(group["lr"]) == float(value) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "value", [torch.tensor(-1.0), torch.tensor(nan), torch.tensor(True), torch.tensor(1j)], ids=str
)
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_tensor_out_of_range_is_refused(key, value):
    with refused(rf"^NAMO: expected {key} to be "):
        NAMO([parameter(3, 3)], **{key: value})


def test_numbers_of_the_command_line_and_of_numpy_are_taken():
    optimizer = NAMOD(
        [matrix_group(blocks=[numpy.int64(1), PositiveInt(2)]), adamw_group(betas=[numpy.float64(0.8), 0.9])],
        lr=NonNegativeFloat(0.02),
        momentum=ClosedUnitInterval(0.5),
        ns_steps=PositiveInt(4),
        clamp=numpy.float32(0.5),
    )
    assert optimizer.param_groups[0]["blocks"] == [1, 2]
    assert optimizer.param_groups[1]["momentum"] == 0.8


def test_a_group_of_both_kinds_takes_the_keys_of_both():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    optimizer = NAMO(split_parameters(module, heads="matrix"))
    module[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(module[1].parameters()), "ns_steps": 3, "betas": (0.7, 0.8)})
    adamw, matrices = optimizer.param_groups[-2:]
    assert (adamw["momentum"], adamw["beta2"], matrices["ns_steps"]) == (0.7, 0.8, 3)
    assert "ns_steps" not in adamw
    assert "betas" not in matrices


class Own(OrthogonalizedOptimizer):
    """A rule with a range of its own, whose constructor mentions none of the engine's keys."""

    ranges: ClassVar[dict[str, Range]] = {"sharpness": UNIT_RANGE}

    def __init__(self, params: Any, lr: float = 0.1, sharpness: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": 0.9, "sharpness": sharpness})


class Sharper(Own):
    ranges: ClassVar[dict[str, Range]] = {"edge": UNIT_RANGE}

    def __init__(self, params: Any, edge: float = 0.5, **keys: Any) -> None:
        super().__init__(params, **keys)


def test_ranges_of_a_class_are_added_to_those_of_its_bases():
    assert Sharper.ranges.keys() - Own.ranges.keys() == {"edge"}
    assert Own.ranges.keys() - OrthogonalizedOptimizer.ranges.keys() == {"sharpness"}
    for keys in ({"sharpness": 1.0}, {"lr": -1.0}, {"ns_steps": 0}, {"adamw_betas": (0.9, 1.0)}):
        for cls in (Own, Sharper):
            with refused(rf"^{cls.__name__}: expected {next(iter(keys))} to be .* but got "):
                cls([parameter(3, 3)], **keys)
    with refused("Own: expected sharpness to be"):
        Own([matrix_group(sharpness=1.0)])


@pytest.mark.parametrize("cls", [Own, Sharper])
def test_the_engines_keys_are_taken_by_constructors_that_do_not_mention_them(cls):
    keys = {"ns_steps": 3, "orthogonalizer": "svd", "momentum_dtype": "bfloat16", "adamw_lr": 0.3, "adamw_eps": 0.1}
    optimizer = cls([matrix_group(), adamw_group()], lr=0.2, **keys)
    matrices, adamw = optimizer.param_groups
    assert [matrices[key] for key in ("ns_steps", "orthogonalizer", "momentum_dtype")] == [3, "svd", "bfloat16"]
    assert (matrices["lr"], adamw["lr"], adamw["eps"]) == (0.2, 0.3, 0.1)
    assert set(inspect.signature(Own).parameters) >= {"params", "lr", "sharpness", *ENGINE_KEYS}
    with pytest.raises(TypeError, match="unexpected keyword argument 'ns_step'"):
        Own([matrix_group()], ns_step=3)
    again = Own([matrix_group(), adamw_group()])
    assert again.param_groups[0]["ns_steps"] == 5, "keys are one optimizer's"


class Fixed(OrthogonalizedOptimizer):
    """Sets some of the engine's keys itself."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        keys = {"lr": lr, "weight_decay": 0.0, "momentum": 0.9, "ns_steps": 10, "momentum_dtype": "bfloat16"}
        super().__init__(params, keys)


class Mentions(Own):
    def __init__(self, params: Any, lr: float = 0.1, ns_steps: int = 9) -> None:
        super().__init__(params, lr, ns_steps=ns_steps)
        self.seen = ns_steps


class Child(Mentions):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)


class Mixed(Mentions):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, ns_steps=8)


class Mixin:
    def __init__(self, params: Any, lr: float = 0.3) -> None:
        super().__init__(params, lr)  # type: ignore[call-arg]


class OfBoth(Mixin, Own):
    pass


@pytest.mark.parametrize(("cls", "steps"), [(Fixed, 10), (Mentions, 9), (Child, 9), (Mixed, 8), (OfBoth, 5), (Own, 5)])
def test_a_class_keeps_its_own_value_of_a_key_that_nobody_gives(cls, steps):
    parser = ArgumentParser()
    parser.add_subclass_arguments(OrthogonalizedOptimizer, "optimizer", skip={"params"}, instantiate=False)
    config = parser.parse_args([f"--optimizer={__name__}.{cls.__name__}"]).optimizer.init_args
    for arguments in ({}, dict(config)):  # a command line passes on what nobody gave
        assert cls([parameter(3, 3)], **arguments).param_groups[0]["ns_steps"] == steps
    given = cls([parameter(3, 3)], ns_steps=5)
    assert given.param_groups[0]["ns_steps"] == 5
    assert getattr(given, "seen", 5) == (8 if cls is Mixed else 5)


def test_ranges_are_checked_themselves():
    with refused(r"Bad: expected ranges\['edge'\] to be a lightning_namo.arguments.Range but got \(0, 1\)"):

        class Bad(Own):
            ranges: ClassVar[dict[str, Any]] = {"edge": (0, 1)}

    with refused("Own: expected sharpness to be in .* but got 'high'"):
        Own([parameter(3, 3)], sharpness="high")


def test_fixed_keys_of_a_class_are_added_to_those_of_its_base():
    class More(Muon):
        fixed: ClassVar[dict[str, Any]] = {"mode": "a"}

    assert More.fixed == {"order": "pre", "mode": "a"}
