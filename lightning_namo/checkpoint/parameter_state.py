"""The state that an optimizer keeps of a parameter, and saved tensors laid out alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_namo.sharding.layout import Layout, Region, stored_shape
from lightning_namo.sharding.local import local_tensor

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # and v, where it is kept by element
State = dict[str, Any]


@dataclass
class Held:
    """A parameter of the optimizer, and what the optimizer keeps of it.

    Attributes:
        name: In the module.
        parameter: As the strategy left it.
        group: Its parameter group.
        state: Its state, in the plain form.
        shape: Of the whole parameter.
        region: The part of it that lies here.
        per_column: Whether v is a statistic by column (True), of the whole matrix (False), or no statistic (None).
    """

    name: str
    parameter: Tensor
    group: dict[str, Any]
    state: State
    shape: tuple[int, ...]
    region: Region
    per_column: bool | None

    def is_like_parameter(self, key: str) -> bool:
        """Whether an entry of the state has the parameter's shape and layout."""
        return key in LIKE_PARAMETER or (key == "v" and self.per_column is None)

    def layout(self, region: Region | None = None) -> Layout:
        """How this part (or another one) of the matrix lies."""
        transposed, blocks = self.group.get("transposed", False), self.group.get("blocks", 1)
        return Layout.of(self.shape, region or self.region, transposed=transposed, blocks=blocks, name=self.name)


def like_own(saved: Any, held: Held, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a saved number or tensor as the optimizer keeps it: laid out like the parameter, or a whole statistic.

    Collective if it is a DTensor of another mesh or of other placements than the parameter.

    Args:
        saved: With the shape of ``held.state[key]``, or of the whole parameter if that entry is laid out like it.
        held: The parameter.
        key: Of its state.
        dtype: Of the result; None: that of ``held.state[key]``.

    Raises:
        ValueError: For a DTensor that cannot be put together, or a parameter that has no memory yet.
    """
    parameter, own = held.parameter, held.state[key]
    if parameter.is_meta:
        raise ValueError(
            f"Expected parameters with memory to load a state for, but {held.name} is on the meta device. "
            "Give the module memory first (module.to_empty(device=...), or load its weights). Nothing was loaded."
        )
    dtype = dtype or own.dtype
    if not held.is_like_parameter(key):
        return torch.empty(own.shape, dtype=dtype, device=parameter.device).copy_(whole(saved, held, key))
    result = torch.zeros_like(parameter, dtype=dtype)
    local = local_tensor(result)
    if isinstance(saved, DTensor) and isinstance(parameter, DTensor) and _same_layout(saved, parameter):
        source = saved.to_local().detach()
    else:
        source = whole(saved, held, key)
        if source.shape != local.shape:
            source = held.region.of(source.reshape(stored_shape(held.shape))).reshape(local.shape)
    local.copy_(source)
    return result


def _same_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def whole(saved: Any, held: Held, key: str) -> Tensor:
    """A saved number or tensor; all of it, if it is a DTensor (collective)."""
    if not isinstance(saved, Tensor):
        return torch.tensor(saved, dtype=torch.float64)
    if not isinstance(saved, DTensor):
        return saved.detach()
    mesh = saved.device_mesh
    try:
        sizes = [dist.get_world_size(mesh.get_group(dim)) for dim in range(mesh.ndim)]
        if mesh.get_coordinate() is None or sizes != list(mesh.shape):
            raise RuntimeError(f"this process is in groups of {sizes} processes")
        return saved.full_tensor().detach()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"Expected to put together {key} of {held.name} from its shards, a DTensor over {mesh}, but its processes "
            f"cannot be reached ({error}). Load on the processes that saved it, or save a whole state dict "
            "(torch.distributed.checkpoint.state_dict.get_optimizer_state_dict with full_state_dict=True). Nothing was "
            "loaded."
        ) from error


def fits(state: State, held: Held) -> bool:
    """Whether a state in the plain form has the entries and the shapes of the optimizer's own."""
    if state.keys() != held.state.keys():
        return False
    ours, theirs = _shapes(held.state), _shapes(state)
    whole = {key: held.shape if held.is_like_parameter(key) else shape for key, shape in ours.items()}
    return all(theirs[key] in (ours[key], whole[key]) for key in ours)


def _shapes(state: State) -> dict[str, Any]:
    """Shapes of tensors and numbers; what is neither, as it is."""
    shapes: dict[str, Any] = {key: () for key, value in state.items() if isinstance(value, int | float)}
    shapes |= {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    return {key: shapes.get(key, value) for key, value in state.items()}


def state_words(state: State) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{key} {shape}" for key, shape in sorted(_shapes(state).items()))
