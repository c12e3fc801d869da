"""What hyper-parameters may be, and which keys a parameter group may have.

One table serves all places they come from: constructors, command lines, `add_param_group`, checkpoints. It has what the
engine and AdamW read, and what most rules do; what one rule alone reads has its range in the rule's class.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_namo.arguments import (
    BOOL,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    UNIT,
    Range,
    choice,
    is_number,
    is_whole,
    or_none,
)
from lightning_namo.polar.coefficients import newton_schulz_polynomials
from lightning_namo.polar.orthogonalize import Method

MomentumDtype = Literal["float32", "bfloat16"]


def _is_rate(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return is_number(value) and value >= 0
    if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.is_meta or (is_number(value.item()) and value.item() >= 0)


def _is_blocks(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, list | tuple) and all(map(is_whole, value)))


def _are_coefficients(value: Any) -> bool:
    try:
        return bool(newton_schulz_polynomials(value, max(len(value), 1)))
    except (TypeError, ValueError):
        return False


_RATE = Range(_is_rate, "a finite number >= 0")  # or a tensor with one, which a captured step reads anew
_OFF = Range(lambda value: value is None or value is False, "False or None (it is not supported)")
_SWITCHES = dict.fromkeys(("maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"), _OFF)
_BETAS = Range(
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(UNIT.accepts, value)),
    "two numbers in [0, 1)",
)
RANGES: Mapping[str, Range] = {
    "lr": _RATE,
    "weight_decay": _RATE,
    "momentum": UNIT,
    "beta2": UNIT,
    "betas": _BETAS,
    "eps": NOT_NEGATIVE,
    "nesterov": BOOL,
    "ns_steps": COUNT,
    "ns_coefficients": Range(
        _are_coefficients, "'quintic', 'polar_express', or triples of finite numbers (a, b, c), at most ns_steps"
    ),
    "orthogonalizer": choice(*get_args(Method)),
    "shape_scale": or_none(POSITIVE),
    "momentum_dtype": or_none(choice(*get_args(MomentumDtype))),
    "adamw_lr": or_none(_RATE),
    "adamw_betas": _BETAS,
    "adamw_eps": NOT_NEGATIVE,
    "adamw_weight_decay": _RATE,
    "name": Range(lambda value: isinstance(value, str), "a string"),
    "orthogonalize": BOOL,
    "transposed": BOOL,
    "batched": Range(
        lambda value: isinstance(value, bool) or (is_whole(value) and value > 1), "True, False or a number of matrices"
    ),
    "blocks": Range(_is_blocks, "a number of blocks or a list of row counts"),  # that they fit: `Layout.of`
    **_SWITCHES,
    "decoupled_weight_decay": Range(lambda value: value is None or value is True, "True or None (it always is)"),
}

ADAMW_KEYS = {"lr", "weight_decay", "momentum", "beta2", "betas", "eps"}
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_COMMON = {"params", "param_names", "name", "orthogonalize", "algorithm", *_SCHEDULERS, *_SWITCHES}

_COMMON.add("decoupled_weight_decay")


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
