"""What hyper-parameters may be, and which keys a parameter group may have.

One table serves all places they come from: the constructor, `add_param_group`, checkpoints, groups of AdamW. Ranges of
one algorithm alone stand with its class.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_namo.polar.coefficients import newton_schulz_polynomials
from lightning_namo.polar.orthogonalize import Method

MomentumDtype = Literal["float32", "bfloat16"]


class Range(NamedTuple):
    """What a hyper-parameter may be.

    Attributes:
        accepts: Whether a value is right; numbers come as Python's own.
        expected: The same in words, after "to be".
    """

    accepts: Callable[[Any], bool]
    expected: str


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def choice(*options: str) -> Range:
    """The range of a hyper-parameter that is one of some words."""
    return Range(lambda value: isinstance(value, str) and value in options, f"one of {options}")


def _is_rate(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return is_number(value) and value >= 0
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.is_meta or (is_number(value.item()) and value.item() >= 0)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_blocks(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, list | tuple) and all(map(_is_whole, value)))


def _is_unit(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _are_coefficients(value: Any) -> bool:
    try:
        return bool(newton_schulz_polynomials(value, max(len(value), 1)))
    except (TypeError, ValueError):
        return False


POSITIVE_OR_NONE = Range(
    lambda value: value is None or (is_number(value) and value > 0), "a finite number > 0, or None"
)

_RATE = Range(_is_rate, "a finite number >= 0")  # or a tensor with one, which a captured step reads anew
_UNIT = Range(_is_unit, "in [0, 1)")
_BOOL = Range(lambda value: isinstance(value, bool), "True or False")
_OFF = Range(lambda value: value is None or value is False, "False or None (it is not supported)")
_STRUCTURE = {
    "name": Range(lambda value: isinstance(value, str), "a string"),
    "orthogonalize": _BOOL,
    "transposed": _BOOL,
    "blocks": Range(_is_blocks, "a number of blocks or a list of row counts"),  # that they fit: `Layout.of`
}

_SWITCHES = dict.fromkeys(("maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"), _OFF)
RANGES: Mapping[str, Range] = {
    "lr": _RATE,
    "weight_decay": _RATE,
    "momentum": _UNIT,
    "beta2": _UNIT,
    "betas": Range(
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_unit, value)),
        "two numbers in [0, 1)",
    ),
    "eps": Range(lambda value: is_number(value) and value >= 0, "a finite number >= 0"),
    "nesterov": _BOOL,
    "ns_steps": Range(lambda value: _is_whole(value) and value >= 1, "a whole number >= 1"),
    "ns_coefficients": Range(
        _are_coefficients, "'quintic', 'polar_express', or triples of finite numbers (a, b, c), at most ns_steps"
    ),
    "orthogonalizer": choice(*get_args(Method)),
    "shape_scale": POSITIVE_OR_NONE,
    "momentum_dtype": Range(
        lambda value: value is None or choice(*get_args(MomentumDtype)).accepts(value),
        f"None or one of {get_args(MomentumDtype)}",
    ),
    **_STRUCTURE,
    **_SWITCHES,
    "decoupled_weight_decay": Range(lambda value: value is None or value is True, "True or None (it always is)"),
}

ADAMW_KEYS = {"lr", "weight_decay", "momentum", "beta2", "betas", "eps"}
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_COMMON = {"params", "param_names", "name", "orthogonalize", "algorithm", *_SCHEDULERS, *_SWITCHES}

_COMMON.add("decoupled_weight_decay")


def check(condition: object, algorithm: str, key: str, expected: str, value: object) -> None:
    """Raise a ValueError that names the hyper-parameter, what was expected and what came."""
    if not condition:
        raise ValueError(f"{algorithm}: expected {key} to be {expected} but got {value}.")


def check_ranges(group: Mapping[str, Any], algorithm: str, ranges: Mapping[str, Range] = RANGES) -> None:
    """Raise for a value of a group that is out of its range; keys without a range are let pass.

    Args:
        group: Hyper-parameters by name.
        algorithm: Name of the optimizer's class, or AdamW.
        ranges: `RANGES`, or a class's own.

    Raises:
        ValueError: With the key, its range and the value.
    """
    names = {"momentum": "betas[0]", "beta2": "betas[1]"} if algorithm == "AdamW" else {}
    for key, value in group.items():
        if key in ranges:
            check(ranges[key].accepts(value), algorithm, names.get(key, key), ranges[key].expected, repr(value))


def unknown_keys(group: Collection[str], keys: Collection[str]) -> list[str]:
    """The keys of a group that are neither among those of its kind nor of torch and its schedulers."""
    return [key for key in group if key not in keys and key not in _COMMON]


def check_keys(group: Collection[str], algorithm: str, keys: Collection[str], others: Collection[str]) -> None:
    """Raise for a key that nothing reads, such as a misspelt one.

    Args:
        group: The keys of a group that was given.
        algorithm: Name of the optimizer's class, or AdamW.
        keys: The hyper-parameters of this kind of group.
        others: Those of the other kind.

    Raises:
        ValueError: With the key and the one to use.
    """
    this, other = ("AdamW", "matrices") if algorithm == "AdamW" else ("matrices", "AdamW")
    for key in unknown_keys(group, keys):
        bare = str(key).removeprefix("adamw_")
        near = difflib.get_close_matches(str(key).lower(), [*keys, *_COMMON], n=3)
        if bare != key and bare in ADAMW_KEYS:
            hint = f"That is an argument of the constructor: set {bare} of a group with orthogonalize=False"
        elif key in others:
            hint = f"It is a key of groups of {other}"
        else:
            hint = f"Nearest: {', '.join(map(repr, near))}" if near else f"There are {', '.join(sorted(keys))}"
        raise ValueError(
            f"{algorithm}: expected a group of {this} to have keys that it knows, but got {key!r}. {hint}. (A key of "
            "your own can be set in optimizer.param_groups afterwards.)"
        )
