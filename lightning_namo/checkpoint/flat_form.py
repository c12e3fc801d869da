"""The form in which FSDP1 gathers and cuts state; see `lightning_namo.checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_namo.checkpoint.parameter_state import ParameterState, State, whole
from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.layout import FlatRange, Rectangle, ShardRegion, stored_shape
from lightning_namo.sharding.local import local_tensor
from lightning_namo.sharding.process_group import largest_over_ranks

_SPREAD = "_by_element"  # ends the key of a rule's state in the flat form; that of v is AdamW's


def flat_form(parameter: ParameterState, kinds: Mapping[str, str]) -> State:
    """The state of a parameter, in the flat form; see the module's docstring.

    Args:
        parameter: The parameter.
        kinds: Of the rule's states, which AdamW's parameters must have as well: FSDP1 wants the same of all.
    """
    state, dtype = parameter.state, torch.promote_types(parameter.tensor.dtype, torch.float32)
    others = [key for key in kinds if key != "v"]
    if "exp_avg" in state:
        return {
            "step": state["step"],
            "momentum_buffer": state["exp_avg"].to(dtype),
            "exp_avg_sq": state["exp_avg_sq"].to(dtype),
            **{key + _SPREAD: torch.zeros_like(state["exp_avg_sq"], dtype=dtype) for key in others},
        }
    flat = {"step": state["step"], "skipped": state["skipped"], "momentum_buffer": state["momentum_buffer"].to(dtype)}
    for key in ("v", *others):
        spread = torch.zeros_like(state["momentum_buffer"], dtype=dtype)
        if key in state:
            spread += _spread(state[key], parameter, key, spread.shape)
        flat["exp_avg_sq" if key == "v" else key + _SPREAD] = spread
    return flat


def _spread(value: Tensor, parameter: ParameterState, key: str, shape: torch.Size) -> Tensor:
    """A rule's state, laid out like the local shard of the parameter."""
    if parameter.is_like_parameter(key):
        return value
    return parameter.layout().spread_state(value, parameter.statistic_kind(key), shape)


def plain_form(saved: State, parameter: ParameterState) -> State:
    """A saved state in the plain form; statistics as far as this rank has them, see `sync_statistics`.

    Args:
        saved: In either form, whole or cut as FSDP1 cuts it (statistics, too, as if they were the parameter).
        parameter: The parameter.
    """
    own = parameter.state
    if "exp_avg" in own:
        kept = {key: value for key, value in saved.items() if not key.endswith(_SPREAD)}
        return {"exp_avg" if key == "momentum_buffer" else key: value for key, value in kept.items()}
    if "momentum_buffer" not in saved:
        return dict(saved)  # for `check_states` to refuse
    state = {key: value for key, value in saved.items() if key != "exp_avg_sq" and not key.endswith(_SPREAD)}
    for key in parameter.kinds:
        value, flat = saved.get(key), saved.get("exp_avg_sq" if key == "v" else key + _SPREAD)
        if flat is not None:
            state[key] = _collected(flat, parameter, key)
        elif isinstance(value, Tensor) and not parameter.is_like_parameter(key) and value.shape != own[key].shape:
            state[key] = _whole_statistic(value, own[key], parameter.region)
    return state


def _collected(spread: Any, parameter: ParameterState, key: str) -> Any:
    """A state from the flat form: whole, or the part that this rank's shard knows; one of another shape as it is."""
    if parameter.is_like_parameter(key) or not isinstance(spread, Tensor):
        return spread
    spread, kind = whole(spread, parameter, key), parameter.statistic_kind(key)
    if tuple(spread.shape) == parameter.shape:
        rows, cols = stored_shape(parameter.shape)
        return parameter.layout(Rectangle(0, rows, 0, cols)).collect_state(spread, kind)
    if spread.shape != local_tensor(parameter.tensor).shape:
        return spread
    return parameter.layout().collect_state(spread, kind)


def _whole_statistic(cut: Tensor, own: Tensor, region: ShardRegion | Box) -> Tensor:
    """Put a cut of a statistic back to where FSDP1 cut it out of the flattened one; another size is for the check."""
    start, stop = (region.start, region.stop) if isinstance(region, FlatRange) else (0, own.numel())
    if cut.dim() != 1 or cut.numel() != max(min(stop, own.numel()) - start, 0):
        return cut
    whole = torch.zeros_like(own).view(-1)
    whole[start : start + cut.numel()] = cut
    return whole.view(own.shape)


def fill_empty(states: Sequence[State], parameters: Sequence[ParameterState]) -> None:
    """Give parameters of which this rank holds nothing their empty state: FSDP1 loads none for them."""
    for state, parameter in zip(states, parameters, strict=True):
        if parameter.region.numel == 0 and not state:
            state.update({key: torch.zeros_like(value) for key, value in parameter.state.items()})


def sync_statistics(states: Sequence[State], parameters: Sequence[ParameterState]) -> None:
    """Make numbers the same on all ranks: a load under FSDP1 gives a rank those of its shards. Collective."""
    keys = [
        (state, key)
        for state, parameter in zip(states, parameters, strict=True)
        for key in ("step", "skipped", *parameter.kinds)
        if key in state and not parameter.is_like_parameter(key)
    ]
    device = local_tensor(parameters[0].tensor).device
    flat = torch.cat([state[key].reshape(-1).to(device, torch.float64) for state, key in keys])
    smallest = flat.neg()
    largest_over_ranks(flat)
    largest_over_ranks(smallest)  # the number itself where it is below 0; ranks that know none have 0
    flat = torch.where(smallest > flat, -smallest, flat)
    sizes = [state[key].numel() for state, key in keys]
    for (state, key), values in zip(keys, torch.split(flat, sizes), strict=True):
        state[key] = values.view(state[key].shape).to(state[key].dtype)
