"""Matrices of one kind and layout in stacks: their state is in tensors that hold it for all of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_namo.optim.adamw import is_dense
from lightning_namo.polar.cost import newton_schulz_flops
from lightning_namo.sharding.batch import BatchPart
from lightning_namo.sharding.layout import Layout, StatisticKind
from lightning_namo.sharding.local import local_gradient, local_tensor

StateKind = Literal["element"] | StatisticKind
STATE_KINDS = ("element", *get_args(StatisticKind))


@dataclass(eq=False)
class MatrixParameter:
    """A parameter of a matrix group, or some matrices of a batched one.

    Attributes:
        name: For messages.
        tensor: The parameter.
        group: Its parameter group.
        layout: Of its local shard; of each matrix of a batched parameter.
        part: Which of a batched parameter's matrices these are; None: it is not batched.
    """

    name: str
    tensor: Tensor
    group: dict[str, Any]
    layout: Layout
    part: BatchPart | None = None

    @property
    def count(self) -> int:
        """How many matrices are stored in it, one after the other."""
        return 1 if self.part is None else self.part.count

    def local(self, tensor: Tensor) -> Tensor:
        """The local shard of the parameter, its gradient or a state like it; (count, ...) of a batched one."""
        return local_tensor(tensor) if self.part is None else self.part.local(tensor)

    @property
    def wire_dtype(self) -> torch.dtype:
        """In which it is communicated: bfloat16 for Newton-Schulz, whatever it iterates in; else the parameter's."""
        return torch.bfloat16 if self.group["orthogonalizer"] == "newton_schulz" else self.tensor.dtype

    @property
    def cost(self) -> int:
        """FLOPs of its orthogonalization."""
        keys = {key: self.group[key] for key in ("ns_steps", "ns_coefficients")}
        return self.count * sum(newton_schulz_flops(shape, **keys) for shape in self.layout.matrix_shapes)


@dataclass(eq=False)
class MatrixStack:
    """P parameters that are laid out alike on every rank, or P matrices of a batched one, and their state.

    Attributes:
        parameters: The P parameters, of one group, shape, layout and dtype; a batched one is by itself.
        kinds: Of the states that the rule keeps.
        counts: Whether this rank's shards count in sums: replicas count once.
        weight: Of this rank's replica in the comparison of replicas; see `Replicas`. 0: there are none.
        holders: How many ranks hold a part of each parameter, (P,). None: this process is alone.
        tolerance: Relative, of the difference of replicas' squared norms, (P,). None: nothing has replicas.
        state: The stacked local states by key, (P, ...).
        bound: The states that are views of these, by parameter and key.
    """

    parameters: Sequence[MatrixParameter]
    kinds: Mapping[str, StateKind]
    counts: bool
    weight: float
    holders: Tensor | None
    tolerance: Tensor | None
    state: dict[str, Tensor] = field(default_factory=dict)
    bound: list[dict[str, Tensor]] = field(default_factory=list)

    @cached_property
    def part(self) -> BatchPart | None:
        """Which matrices of a batched parameter these are; None: they are parameters."""
        return self.parameters[0].part

    @cached_property
    def count(self) -> int:
        """P."""
        return len(self.parameters) if self.part is None else self.part.count

    @cached_property
    def layout(self) -> Layout:
        """Of all of them."""
        return self.parameters[0].layout

    @cached_property
    def group(self) -> dict[str, Any]:
        """Of all of them."""
        return self.parameters[0].group

    @cached_property
    def statistics_dtype(self) -> torch.dtype:
        """Of the numbers."""
        return statistics_dtype(self.parameters[0].tensor)

    @cached_property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.state["step"].device

    @cached_property
    def has_replicas(self) -> bool:
        """Whether gradients of replicas are compared."""
        return self.tolerance is not None

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which momentum and gradient meet."""
        return torch.promote_types(self.parameters[0].tensor.dtype, self.state["momentum_buffer"].dtype)

    @cached_property
    def local_shape(self) -> torch.Size:
        """Of one local shard."""
        shape = self.parameters[0].local(self.parameters[0].tensor).shape
        return shape if self.part is None else shape[1:]

    @cached_property
    def block_sets(self) -> list[list[int]]:
        """The blocks of each shape: [[0, 1, 2]] for equal ones."""
        blocks = self.layout.blocks
        return [[b for b, rows in enumerate(blocks) if rows == size] for size in dict.fromkeys(blocks)]

    def gradients(self) -> list[Tensor | None]:
        """The local gradients of the parameters; those of P matrices of a batched one in one tensor."""
        found = [local_gradient(p.name, p.tensor) for p in self.parameters]
        if self.part is not None and found[0] is not None:
            return [self.part.local(found[0].contiguous())]
        return found

    def bind(self, states: Mapping[Tensor, MutableMapping[str, Any]]) -> None:
        """Make the states of the parameters views of stacked tensors, which `state` holds.

        The state of a single parameter stays where it is, as what has no elements does (views of it cannot be told
        apart from others).

        Args:
            states: The optimizer's.
        """
        of_parameters = [states[parameter.tensor] for parameter in self.parameters]
        keys = ("momentum_buffer", "step", "skipped", *self.kinds)
        for parameter, state in zip(self.parameters, of_parameters, strict=True):
            if missing := [key for key in keys if key not in state]:
                raise ValueError(
                    f"Expected the state of {parameter.name} to have {', '.join(keys)}, but it lacks "
                    f"{', '.join(missing)}. Clear all of it to start it anew."
                )
        self.state = {}
        if self.part is not None:
            self.bound = [dict(of_parameters[0])]
            self.state = {key: self._of_part(self.part, key, of_parameters[0][key]) for key in keys}
            return
        for key in keys:
            parts = [local_tensor(state[key]) for state in of_parameters]
            if len(parts) == 1:
                self.state[key] = parts[0].unsqueeze(0)
                continue
            self.state[key] = _stacked(parts)
            if parts[0].numel():
                for state, view in zip(of_parameters, self.state[key].unbind(), strict=True):
                    state[key] = _like(state[key], view)
        self.bound = [dict(state) for state in of_parameters]

    def _of_part(self, part: BatchPart, key: str, state: Tensor) -> Tensor:
        """These matrices' part of the state of a batched parameter."""
        if key in ("step", "skipped"):
            return state.expand(part.count)
        kind = self.kinds.get(key, "element")
        return part.local(state) if kind == "element" else part.numbers(state, kind)

    def count_step(self, valid: Tensor, skipped: Tensor) -> None:
        """Count a step of a batched parameter that was taken, or skipped, (P,)."""
        if self.part is not None and self.part.first == 0:  # one part counts for all
            self.bound[0]["step"] += valid[0]
            self.bound[0]["skipped"] += skipped[0]

    def is_bound(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether the states are still the ones that were bound: nobody has put others in their place."""
        return all(
            all(states[parameter.tensor].get(key) is value for key, value in bound.items())
            for parameter, bound in zip(self.parameters, self.bound, strict=True)
        )

    def some(self, first: int, end: int) -> MatrixStack:
        """The stack of some consecutive parameters of this one."""
        return replace(
            self,
            parameters=self.parameters[first:end],
            holders=None if self.holders is None else self.holders[first:end],
            tolerance=None if self.tolerance is None else self.tolerance[first:end],
            state={key: value[first:end] for key, value in self.state.items()},
        )


def statistics_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def momentum_dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    """None: the parameter's. Groups of older checkpoints have no such key."""
    name = group.get("momentum_dtype")
    return None if name is None else cast(torch.dtype, getattr(torch, name))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape in one (K, ...), in memory as the first; the one that they are views of is found again."""
    first, count = parts[0], len(parts)
    dense = is_dense(first)
    stride = first.stride() if dense else torch.empty_like(first, memory_format=torch.contiguous_format).stride()
    numel = first.numel()
    begin = first.storage_offset()
    if numel and all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == begin + i * numel
        and part.stride() == stride
        and part.dtype == first.dtype
        and not part.is_meta
        for i, part in enumerate(parts)
    ):
        return first.as_strided((count, *first.shape), (numel, *stride))
    memory = torch.empty(count * numel, dtype=first.dtype, device=first.device)
    stacked = memory.as_strided((count, *first.shape), (numel, *stride))
    torch._foreach_copy_(list(stacked.unbind()), list(parts))
    return stacked


def _like(state: Tensor, view: Tensor) -> Tensor:
    """A local view as the state was given: a DTensor, or the view."""
    if not isinstance(state, DTensor):
        return view
    return DTensor.from_local(
        view, state.device_mesh, state.placements, run_check=False, shape=state.shape, stride=state.stride()
    )
