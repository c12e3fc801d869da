"""The form in which FSDP1 gathers and cuts state; see `lightning_namo.checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_namo.checkpoint.parameter_state import Held, State, whole
from lightning_namo.sharding.layout import Block, Region, Span, stored_shape
from lightning_namo.sharding.local import local_tensor

STATISTICS = ("step", "skipped", "v")  # kept in float32 at least, whatever the parameter's dtype


def flat_form(held: Held) -> State:
    """The state of a parameter, in the flat form; see the module's docstring."""
    state, dtype = held.state, torch.promote_types(held.parameter.dtype, torch.float32)
    if "exp_avg" in state:
        return {
            "step": state["step"],
            "momentum_buffer": state["exp_avg"].to(dtype),
            "exp_avg_sq": state["exp_avg_sq"].to(dtype),
        }
    second = torch.zeros_like(state["momentum_buffer"], dtype=dtype)
    if "v" in state:
        v = state["v"]
        second += v if held.per_column is None else held.layout().spread(v[None], held.per_column, second.shape)[0]
    momentum = state["momentum_buffer"].to(dtype)
    return {"step": state["step"], "skipped": state["skipped"], "momentum_buffer": momentum, "exp_avg_sq": second}


def plain_form(saved: State, held: Held) -> State:
    """A saved state in the plain form, v as far as this rank has it (see `complete`), the rest as it was saved.

    Args:
        saved: In either form, whole or cut as FSDP1 cuts it (which cuts v as well, as if it were the parameter).
        held: The parameter.
    """
    own = held.state
    if "exp_avg" in own:
        return {"exp_avg" if key == "momentum_buffer" else key: value for key, value in saved.items()}
    if "momentum_buffer" not in saved:
        return dict(saved)  # for `check_states` to refuse
    state = {key: value for key, value in saved.items() if key != "exp_avg_sq"}
    if "exp_avg_sq" in saved and "v" in own:
        state["v"] = _collected(saved["exp_avg_sq"], held)
    elif isinstance(v := saved.get("v"), Tensor) and held.per_column is not None and v.shape != own["v"].shape:
        state["v"] = _uncut(v, own["v"], held.region)
    return state


def _collected(second: Any, held: Held) -> Any:
    """V from the flat form: whole, or the part that this rank's shard knows; one of another shape as it is."""
    if held.per_column is None or not isinstance(second, Tensor):
        return second
    second = whole(second, held, "v")
    if tuple(second.shape) == held.shape:
        rows, cols = stored_shape(held.shape)
        return held.layout(Block(0, rows, 0, cols)).collect(second[None], held.per_column)[0]
    if second.shape != local_tensor(held.parameter).shape:
        return second
    return held.layout().collect(second[None], held.per_column)[0]


def _uncut(v: Tensor, own: Tensor, region: Region) -> Tensor:
    """Put a cut of v back to where FSDP1 cut it out of the flattened v; a v of another size is left for the check."""
    start, stop = (region.start, region.stop) if isinstance(region, Span) else (0, own.numel())
    if v.dim() != 1 or v.numel() != max(min(stop, own.numel()) - start, 0):
        return v
    whole = torch.zeros_like(own).view(-1)
    whole[start : start + v.numel()] = v
    return whole.view(own.shape)


def fill_empty(states: Sequence[State], held: Sequence[Held]) -> None:
    """Give parameters of which nothing lies here their empty state: FSDP1 loads none for them."""
    for state, h in zip(states, held, strict=True):
        if h.region.numel == 0 and not state:
            state.update({key: torch.zeros_like(value) for key, value in h.state.items()})


def complete(states: Sequence[State], held: Sequence[Held]) -> None:
    """Share out scalars and v after a load under FSDP1, where a rank knows those of its shards. Collective."""
    keys = [
        (state, key)
        for state, h in zip(states, held, strict=True)
        for key in STATISTICS
        if key in state and not (key == "v" and h.per_column is None)
    ]
    device = local_tensor(held[0].parameter).device
    flat = torch.cat([state[key].reshape(-1).to(device, torch.float64) for state, key in keys])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    sizes = [state[key].numel() for state, key in keys]
    for (state, key), values in zip(keys, torch.split(flat, sizes), strict=True):
        state[key] = values.view(state[key].shape).to(state[key].dtype)
