"""A state dict brought into the order of an optimizer, or refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_namo.checkpoint.parameter_state import ParameterState, State, fits, like_own, state_words
from lightning_namo.routing.names import clean_name

# Keys that say what a group's state is, and what absence means; a rule may have more.
STRUCTURE = {"orthogonalize": True, "transposed": False, "blocks": 1, "algorithm": None}


@dataclass
class Saved:
    """What a state dict holds, in the order of the optimizer's groups and parameters."""

    groups: list[dict[str, Any]]
    states: list[State]


def read(
    state_dict: Mapping[str, Any],
    parameters: Sequence[ParameterState],
    groups: Sequence[dict[str, Any]],
    cls: str,
    fixed: Mapping[str, Any],
    name_algorithm: Callable[[dict[str, Any]], None],
) -> Saved:
    """Bring a state dict into the order of the optimizer, by names where it has them.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` makes it, or torch.distributed.checkpoint.
        parameters: The optimizer's parameters, in the order of its groups.
        groups: The optimizer's groups.
        cls: Name of the optimizer's class.
        fixed: Keys of matrix groups by which the states change their meaning, and what absence means.
        name_algorithm: Says in a group what a checkpoint would say of its algorithm.

    Raises:
        ValueError: If it is of other parameters or of another routing; the message names what differs.
    """
    _check_is_state_dict(state_dict)
    theirs = state_dict["param_groups"]
    names = saved_names(theirs)
    if names is None:  # numbers only, or torch.distributed.checkpoint, which has put names into our order
        counts = [len(group["params"]) for group in groups]
        if (saved_counts := [len(group["params"]) for group in theirs]) != counts:
            raise ValueError(
                f"Expected parameter groups of {counts} parameters, as {cls} has, but the checkpoint's have "
                f"{saved_counts}. It is of another optimizer, model or routing; pass adopt_state=True to take over the "
                "momentum of torch.optim.AdamW or another optimizer. Nothing was loaded."
            )
        ids = [i for group in theirs for i in group["params"]]
        ordered = list(theirs)
    else:
        check_names(names, parameters)
        ids = [names[clean_name(parameter.name)][1] for parameter in parameters]
        ordered = _matching_groups(theirs, names, parameters, groups)
    for group, own in zip(ordered, [dict(own) for own in groups], strict=True):
        name_algorithm(own)
        _check_structure(group, own, cls, fixed)
    return Saved(ordered, [state_dict["state"].get(i, {}) for i in ids])


def _check_is_state_dict(state_dict: Mapping[str, Any]) -> None:
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"Expected the state dict of an optimizer, with 'state' and 'param_groups', but got the keys "
            f"{sorted(map(str, state_dict))[:10]}. Nothing was loaded."
        )


def saved_names(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, Any]] | None:
    """From a parameter's name to the index of its group and its id; None if there are no names, or they are ids."""
    names: dict[str, tuple[int, Any]] = {}
    for index, group in enumerate(groups):
        theirs, ids = group.get("param_names"), group["params"]
        if theirs is None or len(theirs) != len(ids) or any(isinstance(i, str) for i in ids):
            return None
        names |= {clean_name(name): (index, i) for name, i in zip(theirs, ids, strict=True)}
    return names


def check_names(names: Iterable[str], parameters: Sequence[ParameterState]) -> None:
    """Raise if the parameters of a checkpoint are others than the optimizer's."""
    ours, theirs = [clean_name(parameter.name) for parameter in parameters], list(names)
    missing, unknown = [n for n in ours if n not in set(theirs)], [n for n in theirs if n not in set(ours)]
    if missing or unknown:
        raise ValueError(
            f"Expected a checkpoint of the optimizer's parameters, but {_differing(missing, unknown)}. It is of "
            "another model, or other parameters were frozen. Nothing was loaded."
        )


def _matching_groups(
    theirs: Sequence[dict[str, Any]],
    names: Mapping[str, tuple[int, Any]],
    parameters: Sequence[ParameterState],
    groups: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """For each of the optimizer's groups the saved one with the same parameters."""
    ordered = []
    for group in groups:
        members = [parameter for parameter in parameters if parameter.group is group]
        places = [names[clean_name(parameter.name)][0] for parameter in members]
        for parameter, place in zip(members, places, strict=True):
            if place != places[0] or len(theirs[place]["params"]) != len(members):
                raise ValueError(
                    f"Expected the groups of the checkpoint to be the optimizer's, but {parameter.name} is in "
                    f"{theirs[place].get('name', place)!r} with {len(theirs[place]['params'])} parameters there, and "
                    f"in {group['name']!r} with {len(members)} here. It is of another routing. Nothing was loaded."
                )
        ordered.append(theirs[places[0]] if places else {**group, "params": []})
    return ordered


def _check_structure(saved: Mapping[str, Any], own: Mapping[str, Any], cls: str, fixed: Mapping[str, Any]) -> None:
    """Compare the keys that say what is done with a group; a group of unknown origin has none."""
    for key, absent in {**fixed, **STRUCTURE}.items():
        known = key in fixed or (key in own and key in saved)
        if known and saved.get(key, absent) != own.get(key, absent) and own["params"]:
            what = f"of {cls}" if key == "algorithm" else f"with {key}={own.get(key, absent)} in group {own['name']!r}"
            found = f"{key}={saved.get(key, absent)!r}"
            raise ValueError(
                f"Expected a checkpoint {what}, but it has {found}. Train on with what it was trained with, "
                "or pass adopt_state=True to take over its momentum and start the rest anew. Nothing was loaded."
            )


def laid_out(states: Sequence[State], parameters: Sequence[ParameterState]) -> list[State]:
    """New states, laid out as the optimizer keeps them, from what `check_states` has let pass; see `like_own`."""
    return [
        {key: like_own(value, parameter, key) for key, value in state.items()}
        for state, parameter in zip(states, parameters, strict=True)
    ]


def check_states(states: Sequence[State], parameters: Sequence[ParameterState], cls: str) -> None:
    """Raise if the optimizer keeps another state of some parameter than a checkpoint holds.

    Args:
        states: In the plain form.
        parameters: The optimizer's parameters.
        cls: Name of the optimizer's class.

    Raises:
        ValueError: Naming the parameter, what was expected and what came.
    """
    for state, parameter in zip(states, parameters, strict=True):
        if not fits(state, parameter):
            frozen = (
                " The parameter is frozen, and torch.distributed.checkpoint leaves out the state of frozen parameters: "
                "set requires_grad=True while you save and load."
            )
            raise ValueError(
                f"Expected the state of {parameter.name} to be {state_words(parameter.state)} but the checkpoint has "
                f"{state_words(state) or 'none'}. It is of another optimizer than {cls}, of another model or routing, "
                "incomplete, or one rank's shards. To take over the momentum of another optimizer pass "
                f"adopt_state=True.{'' if state or parameter.tensor.requires_grad else frozen} Nothing was loaded."
            )


def _differing(missing: Sequence[str], unknown: Sequence[str]) -> str:
    parts = [f"it lacks {first_few(missing)}"] * bool(missing) + [f"it has {first_few(unknown)} besides"] * bool(
        unknown
    )
    return " and ".join(parts)


def first_few(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
