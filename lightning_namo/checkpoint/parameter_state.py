"""The state that an optimizer keeps of a parameter, and saved tensors laid out alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_namo.sharding.batch import BatchLayout, Box, layout_of
from lightning_namo.sharding.layout import Layout, ShardRegion, StatisticKind, stored_shape
from lightning_namo.sharding.local import local_tensor

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # and the rule's states by element
State = dict[str, Any]


@dataclass
class ParameterState:
    """A parameter of the optimizer, and what the optimizer keeps of it.

    Attributes:
        name: In the module.
        tensor: The parameter itself, as the strategy left it.
        group: Its parameter group.
        state: Its state, in the plain form.
        shape: Of the whole parameter.
        region: The part of it that this rank holds.
        kinds: Of the states that the optimizer's rule keeps beside the momentum: "matrix", "column", "row", "element".
    """

    name: str
    tensor: Tensor
    group: dict[str, Any]
    state: State
    shape: tuple[int, ...]
    region: ShardRegion | Box
    kinds: Mapping[str, str]

    def is_like_parameter(self, key: str) -> bool:
        """Whether a state has the parameter's shape and layout."""
        return key in LIKE_PARAMETER or self.kinds.get(key) == "element"

    def statistic_kind(self, key: str) -> StatisticKind:
        """Of a state that is not like the parameter: of what it has one number each."""
        return cast(StatisticKind, self.kinds[key])

    def layout(self, region: ShardRegion | None = None) -> Layout | BatchLayout:
        """The layout of this part (or another one) of the matrix."""
        keys = {"transposed": self.group.get("transposed", False), "blocks": self.group.get("blocks", 1)}
        return layout_of(
            self.shape, region or self.region, batched=self.group.get("batched", False), name=self.name, **keys
        )


def like_own(saved: Any, parameter: ParameterState, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a saved number or tensor as the optimizer keeps it: laid out like the parameter, or a whole statistic.

    Collective if it is a DTensor of another mesh or of other placements than the parameter.

    Args:
        saved: With the shape of ``parameter.state[key]``, or of the whole parameter if that state is laid out like it.
        parameter: The parameter.
        key: Of its state.
        dtype: Of the result; None: that of ``parameter.state[key]``.

    Raises:
        ValueError: For a DTensor that cannot be put together, or a parameter that has no memory yet.
    """
    tensor, own = parameter.tensor, parameter.state[key]
    if tensor.is_meta:
        raise ValueError(
            f"Expected parameters with memory to load a state for, but {parameter.name} is on the meta device. "
            "Give the module memory first (module.to_empty(device=...), or load its weights). Nothing was loaded."
        )
    dtype = dtype or own.dtype
    if not parameter.is_like_parameter(key):
        return torch.empty(own.shape, dtype=dtype, device=tensor.device).copy_(whole(saved, parameter, key))
    result = torch.zeros_like(tensor, dtype=dtype)
    local = local_tensor(result)
    if isinstance(saved, DTensor) and isinstance(tensor, DTensor) and _same_layout(saved, tensor):
        source = saved.to_local().detach()
    else:
        source = whole(saved, parameter, key)
        if source.shape != local.shape:
            source = parameter.region.of(source.reshape(stored_shape(parameter.shape))).reshape(local.shape)
    local.copy_(source)
    return result


def _same_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def whole(saved: Any, parameter: ParameterState, key: str) -> Tensor:
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
            f"Expected to put together {key} of {parameter.name} from its shards, a DTensor over {mesh}, but its "
            f"processes cannot be reached ({error}). Load on the processes that saved it, or save a whole state dict "
            "(torch.distributed.checkpoint.state_dict.get_optimizer_state_dict with full_state_dict=True). Nothing was "
            "loaded."
        ) from error


def fits(state: State, parameter: ParameterState) -> bool:
    """Whether a state in the plain form has the keys and the shapes of the optimizer's own."""
    if state.keys() != parameter.state.keys():
        return False
    ours, theirs = _shapes(parameter.state), _shapes(state)
    expected = {key: parameter.shape if parameter.is_like_parameter(key) else shape for key, shape in ours.items()}
    return all(theirs[key] in (ours[key], expected[key]) for key in ours)


def _shapes(state: State) -> dict[str, Any]:
    """Shapes of tensors and numbers; what is neither, as it is."""
    shapes: dict[str, Any] = {key: () for key, value in state.items() if isinstance(value, int | float)}
    shapes |= {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    return {key: shapes.get(key, value) for key, value in state.items()}


def state_words(state: State) -> str:
    """Names and shapes, for messages."""
    return ", ".join(f"{key} {shape}" for key, shape in sorted(_shapes(state).items()))
