"""Going on from another optimizer's checkpoint: its momentum is taken over, other states start anew, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_namo.checkpoint.flat_form import plain_form
from lightning_namo.checkpoint.parameter_state import ParameterState, State, fits, like_own
from lightning_namo.checkpoint.reading import check_names, first_few, saved_names
from lightning_namo.routing.names import clean_name
from lightning_namo.sharding.local import local_tensor

OWN_MOMENTUM = "momentum of its own"  # ends the algorithm of saved groups whose momentum is no average of gradients
BiasCorrection: TypeAlias = Callable[[float, Tensor], Tensor]  # from decay and number of steps


def warm_start_states(
    state_dict: Mapping[str, Any],
    parameters: Sequence[ParameterState],
    module: nn.Module | None,
    cls: str,
    reason: str,
    bias_correction: BiasCorrection,
) -> list[State]:
    """States to go on with, in the plain form: those of AdamW's parameters whole, of matrices the momentum.

    Args:
        state_dict: Of an optimizer over the same parameters, with ``momentum_buffer`` or ``exp_avg`` of the matrices.
        parameters: The parameters of the optimizer that goes on.
        module: Whose parameters they are; gives names to a state dict that has none.
        cls: Name of the optimizer's class.
        reason: Why the state dict does not load as it is.
        bias_correction: Formula by which an average from zero on, after some steps of a decay, is too small.

    Raises:
        ValueError: If it is of other parameters.
    """
    saved = _by_name(state_dict, parameters, module, reason)
    states, taken = [], {"momentum": 0, "whole": 0}
    fresh = []
    for parameter in parameters:
        group, theirs = saved[clean_name(parameter.name)]
        state = {key: torch.zeros_like(value) for key, value in parameter.state.items()}
        if "exp_avg" in state:
            theirs = plain_form(theirs, parameter)
            whole = {key: theirs[key] for key in state if key in theirs}
            found = "whole" if whole.keys() == state.keys() else ""
            state |= {key: _taken(value, parameter, key) for key, value in whole.items()} if found else {}
        else:
            momentum = _momentum(theirs, group, parameter, bias_correction)
            found = "" if momentum is None else "momentum"
            state["momentum_buffer"] = state["momentum_buffer"] if momentum is None else momentum
        states.append(state)
        if found:
            taken[found] += 1
        elif parameter.region.numel:
            fresh.append(parameter.name)
    warnings.warn(
        f"{cls} goes on from another optimizer's checkpoint ({reason.partition('. ')[0]}). Taken over: the momentum of "
        f"{taken['momentum']} matrices, from which their other states start, and the whole state of {taken['whole']} "
        f"AdamW parameters. Starting anew: {first_few(fresh) or 'none'}. Hyper-parameters are this run's.",
        stacklevel=4,
    )
    return states


def _by_name(
    state_dict: Mapping[str, Any], parameters: Sequence[ParameterState], module: nn.Module | None, reason: str
) -> dict[str, tuple[dict[str, Any], State]]:
    """The group and the state of every parameter of a state dict."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    names = saved_names(groups)
    if names is None:
        ids = [(index, i) for index, group in enumerate(groups) for i in group["params"]]
        if all(isinstance(i, str) for _, i in ids):
            names = {clean_name(i): (index, i) for index, i in ids}
        else:
            trained = [] if module is None else [n for n, p in module.named_parameters() if p.requires_grad]
            if len(groups) > 1 or len(trained) != len(ids):
                raise ValueError(f"{reason} It has no names of parameters either, so that none can be taken over.")
            names = {clean_name(name): place for name, place in zip(trained, ids, strict=True)}
    check_names(names, parameters)
    return {name: (groups[index], states.get(i, {})) for name, (index, i) in names.items()}


def _taken(saved: Any, parameter: ParameterState, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """One state of another optimizer, laid out as this one keeps it."""
    if not fits(parameter.state | {key: saved}, parameter):
        raise ValueError(
            f"Expected {key} of {parameter.name} to have shape {tuple(parameter.state[key].shape)} but the "
            f"checkpoint's has {tuple(getattr(saved, 'shape', ()))}. It is of another model. Nothing was loaded."
        )
    return like_own(saved, parameter, key, dtype)


def _momentum(
    saved: State, group: Mapping[str, Any], parameter: ParameterState, bias_correction: BiasCorrection
) -> Tensor | None:
    """The momentum of a matrix, free of its start at zero where the step and the decay are known."""
    momentum = saved.get("exp_avg", saved.get("momentum_buffer"))
    if not isinstance(momentum, Tensor) or str(group.get("algorithm")).endswith(OWN_MOMENTUM):
        return None
    dtype = torch.promote_types(parameter.tensor.dtype, parameter.state["momentum_buffer"].dtype)
    taken = _taken(momentum, parameter, "momentum_buffer", dtype)
    decay = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    step = torch.as_tensor(saved.get("step", 0.0), dtype=torch.float64)
    local = local_tensor(taken)
    if step > 0:
        local.div_(bias_correction(decay, step).to(local))
    return taken
