"""The form in which FSDP1 gathers and cuts state; see `lightning_namo.checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_namo.checkpoint.parameter_state import ParameterState, State, whole
from lightning_namo.sharding.layout import FlatRange, Rectangle, ShardRegion, stored_shape
from lightning_namo.sharding.local import local_tensor
from lightning_namo.sharding.process_group import largest_over_ranks

STATISTICS = ("step", "skipped", "v")  # kept in float32 at least, whatever the parameter's dtype


def flat_form(parameter: ParameterState) -> State:
    """The state of a parameter, in the flat form; see the module's docstring."""
    state, dtype = parameter.state, torch.promote_types(parameter.tensor.dtype, torch.float32)
    if "exp_avg" in state:
        return {
            "step": state["step"],
            "momentum_buffer": state["exp_avg"].to(dtype),
            "exp_avg_sq": state["exp_avg_sq"].to(dtype),
        }
    second = torch.zeros_like(state["momentum_buffer"], dtype=dtype)
    if "v" in state:
        v = state["v"]
        second += (
            v
            if parameter.per_column is None
            else parameter.layout().expand_to_shard(v[None], parameter.per_column, second.shape)[0]
        )
    momentum = state["momentum_buffer"].to(dtype)
    return {"step": state["step"], "skipped": state["skipped"], "momentum_buffer": momentum, "exp_avg_sq": second}


def plain_form(saved: State, parameter: ParameterState) -> State:
    """A saved state in the plain form; v as far as this rank has it, see `sync_statistics`.

    Args:
        saved: In either form, whole or cut as FSDP1 cuts it (which cuts v as well, as if it were the parameter).
        parameter: The parameter.
    """
    own = parameter.state
    if "exp_avg" in own:
        return {"exp_avg" if key == "momentum_buffer" else key: value for key, value in saved.items()}
    if "momentum_buffer" not in saved:
        return dict(saved)  # for `check_states` to refuse
    state = {key: value for key, value in saved.items() if key != "exp_avg_sq"}
    if "exp_avg_sq" in saved and "v" in own:
        state["v"] = _reduced_v(saved["exp_avg_sq"], parameter)
    elif isinstance(v := saved.get("v"), Tensor) and parameter.per_column is not None and v.shape != own["v"].shape:
        state["v"] = _whole_v(v, own["v"], parameter.region)
    return state


def _reduced_v(second: Any, parameter: ParameterState) -> Any:
    """V from the flat form: whole, or the part that this rank's shard knows; one of another shape as it is."""
    if parameter.per_column is None or not isinstance(second, Tensor):
        return second
    second = whole(second, parameter, "v")
    if tuple(second.shape) == parameter.shape:
        rows, cols = stored_shape(parameter.shape)
        return parameter.layout(Rectangle(0, rows, 0, cols)).reduce_from_shard(second[None], parameter.per_column)[0]
    if second.shape != local_tensor(parameter.tensor).shape:
        return second
    return parameter.layout().reduce_from_shard(second[None], parameter.per_column)[0]


def _whole_v(v: Tensor, own: Tensor, region: ShardRegion) -> Tensor:
    """Put a cut of v back to where FSDP1 cut it out of the flattened v; a v of another size is left for the check."""
    start, stop = (region.start, region.stop) if isinstance(region, FlatRange) else (0, own.numel())
    if v.dim() != 1 or v.numel() != max(min(stop, own.numel()) - start, 0):
        return v
    whole = torch.zeros_like(own).view(-1)
    whole[start : start + v.numel()] = v
    return whole.view(own.shape)


def fill_empty(states: Sequence[State], parameters: Sequence[ParameterState]) -> None:
    """Give parameters of which this rank holds nothing their empty state: FSDP1 loads none for them."""
    for state, parameter in zip(states, parameters, strict=True):
        if parameter.region.numel == 0 and not state:
            state.update({key: torch.zeros_like(value) for key, value in parameter.state.items()})


def sync_statistics(states: Sequence[State], parameters: Sequence[ParameterState]) -> None:
    """Make scalars and v the same on all ranks: a load under FSDP1 gives a rank those of its shards. Collective."""
    keys = [
        (state, key)
        for state, parameter in zip(states, parameters, strict=True)
        for key in STATISTICS
        if key in state and not (key == "v" and parameter.per_column is None)
    ]
    device = local_tensor(parameters[0].tensor).device
    flat = torch.cat([state[key].reshape(-1).to(device, torch.float64) for state, key in keys])
    largest_over_ranks(flat)
    sizes = [state[key].numel() for state, key in keys]
    for (state, key), values in zip(keys, torch.split(flat, sizes), strict=True):
        state[key] = values.view(state[key].shape).to(state[key].dtype)
