"""State dicts that load again under another strategy or number of ranks, or are refused before anything is loaded.

Two forms are in use. The plain form is what the optimizer keeps (``momentum_buffer``, ``v``, ``step``, ``skipped``;
AdamW's ``exp_avg``, ``exp_avg_sq``, ``step``). FSDP1 gathers and cuts only state that is shaped like its parameter, and
the same entries for all parameters of a unit; so what is saved under it has the *flat form*: ``momentum_buffer`` and
``exp_avg_sq`` for every parameter, v spread over its matrix, beside the scalars. Both forms load everywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from lightning_namo.param_groups import clean_name
from lightning_namo.regions import Block, Layout, Region, Span, local_tensor, stored_shape

STATISTICS = ("step", "skipped", "v")  # kept in float32 at least, whatever the parameter's dtype
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # and v, where it is kept by element
STRUCTURE = {"orthogonalize": True, "transposed": False, "blocks": 1, "algorithm": None}  # keys, and what absence means

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


@dataclass
class Saved:
    """What a state dict holds, in the order of the optimizer's groups and parameters."""

    groups: list[dict[str, Any]]
    states: list[State]


def holds_fsdp1(module: nn.Module | None) -> bool:
    """Whether a module has FSDP1 units."""
    return module is not None and any(isinstance(m, FullyShardedDataParallel) for m in module.modules())


# ---------------------------------------------------------------------- saving


def number_by_module(optimizer: Optimizer, module: nn.Module) -> None:
    """Let an optimizer give parameters their positions in ``module.parameters()`` as ids when Lightning saves it.

    torch numbers by groups. When a run is resumed under FSDP or ModelParallelStrategy, Lightning turns the ids of a
    checkpoint of one device or DDP into names by the order of the module: ids by groups would give each parameter the
    state of another. torch.distributed.checkpoint counts by groups. What tells the two apart is that Lightning and
    Fabric call ``consolidate_state_dict`` right before ``state_dict`` if an optimizer has it, on one device and under
    DDP, and nothing else does.
    """
    reference, asked = weakref.ref(module), False

    def consolidate_state_dict(to: int = 0) -> None:
        nonlocal asked
        asked = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == to

    def renumber(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal asked
        by_module, asked, root = asked, False, reference()
        positions = {} if root is None else {id(p): position for position, p in enumerate(root.parameters())}
        new = [positions.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        if not by_module or None in new:
            return None
        return {
            "state": {new[i]: state for i, state in state_dict["state"].items()},
            "param_groups": [{**g, "params": [new[i] for i in g["params"]]} for g in state_dict["param_groups"]],
        }

    optimizer.consolidate_state_dict = consolidate_state_dict  # type: ignore[attr-defined]
    optimizer.register_state_dict_post_hook(renumber)


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


# ---------------------------------------------------------------------- loading


def read(state_dict: Mapping[str, Any], held: Sequence[Held], groups: Sequence[dict[str, Any]], cls: str) -> Saved:
    """Bring a state dict into the order of the optimizer, by names where it has them.

    Args:
        state_dict: As `torch.optim.Optimizer.state_dict` makes it, or torch.distributed.checkpoint.
        held: The optimizer's parameters, in the order of its groups.
        groups: The optimizer's groups.
        cls: Name of the optimizer's class.

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
                f"{saved_counts}. It is of another model or routing. Nothing was loaded."
            )
        ids = [i for group in theirs for i in group["params"]]
        ordered = list(theirs)
    else:
        check_names(names, held)
        ids = [names[clean_name(h.name)][1] for h in held]
        ordered = _matching_groups(theirs, names, held, groups)
    for group, own in zip(ordered, groups, strict=True):
        _check_structure(group, own, cls)
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


def check_names(names: Iterable[str], held: Sequence[Held]) -> None:
    """Raise if the parameters of a checkpoint are others than the optimizer's."""
    ours, theirs = [clean_name(h.name) for h in held], list(names)
    missing, unknown = [n for n in ours if n not in set(theirs)], [n for n in theirs if n not in set(ours)]
    if missing or unknown:
        raise ValueError(
            f"Expected a checkpoint of the optimizer's parameters, but {_differing(missing, unknown)}. It is of "
            "another model, or other parameters were frozen. Nothing was loaded."
        )


def _matching_groups(
    theirs: Sequence[dict[str, Any]],
    names: Mapping[str, tuple[int, Any]],
    held: Sequence[Held],
    groups: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """For each of the optimizer's groups the saved one with the same parameters."""
    ordered = []
    for group in groups:
        members = [h for h in held if h.group is group]
        places = [names[clean_name(h.name)][0] for h in members]
        for h, place in zip(members, places, strict=True):
            if place != places[0] or len(theirs[place]["params"]) != len(members):
                raise ValueError(
                    f"Expected the groups of the checkpoint to be the optimizer's, but {h.name} is in "
                    f"{theirs[place].get('name', place)!r} with {len(theirs[place]['params'])} parameters there, and "
                    f"in {group['name']!r} with {len(members)} here. It is of another routing. Nothing was loaded."
                )
        ordered.append(theirs[places[0]] if places else {**group, "params": []})
    return ordered


def _check_structure(saved: Mapping[str, Any], own: Mapping[str, Any], cls: str) -> None:
    """Compare the keys that say what is done with a group; a group of unknown origin has none."""
    for key, absent in STRUCTURE.items():
        if key in saved and key in own and saved[key] != own.get(key, absent) and own["params"]:
            what = f"of {cls}" if key == "algorithm" else f"with {key}={own[key]} in group {own['name']!r}"
            raise ValueError(
                f"Expected a checkpoint {what}, but it has {key}={saved[key]!r}. Train on with what it was trained "
                "with, or pass adopt_state=True to take over its momentum and start the rest anew. Nothing was loaded."
            )


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


def laid_out(states: Sequence[State], held: Sequence[Held]) -> list[State]:
    """New states, laid out as the optimizer keeps them, from what `check_states` has let pass; see `like_own`."""
    return [
        {key: like_own(value, h, key) for key, value in state.items()} for state, h in zip(states, held, strict=True)
    ]


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
        return torch.empty(own.shape, dtype=dtype, device=parameter.device).copy_(_whole(saved, held, key))
    result = torch.zeros_like(parameter, dtype=dtype)
    local = local_tensor(result)
    if isinstance(saved, DTensor) and isinstance(parameter, DTensor) and _same_layout(saved, parameter):
        source = saved.to_local().detach()
    else:
        source = _whole(saved, held, key)
        if source.shape != local.shape:
            source = held.region.of(source.reshape(stored_shape(held.shape))).reshape(local.shape)
    local.copy_(source)
    return result


def _same_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def _whole(saved: Any, held: Held, key: str) -> Tensor:
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


def _collected(second: Any, held: Held) -> Any:
    """V from the flat form: whole, or the part that this rank's shard knows; one of another shape as it is."""
    if held.per_column is None or not isinstance(second, Tensor):
        return second
    second = _whole(second, held, "v")
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


def check_states(states: Sequence[State], held: Sequence[Held], cls: str) -> None:
    """Raise if the optimizer keeps another state of some parameter than a checkpoint holds.

    Args:
        states: In the plain form.
        held: The optimizer's parameters.
        cls: Name of the optimizer's class.

    Raises:
        ValueError: Naming the parameter, what was expected and what came.
    """
    for state, h in zip(states, held, strict=True):
        if not fits(state, h):
            frozen = (
                " The parameter is frozen, and torch.distributed.checkpoint leaves out the state of frozen parameters: "
                "set requires_grad=True while you save and load."
            )
            raise ValueError(
                f"Expected the state of {h.name} to be {_words(h.state)} but the checkpoint has "
                f"{_words(state) or 'none'}. It is of another optimizer than {cls}, of another model or routing, "
                "incomplete, or one rank's shards. To take over the momentum of another optimizer pass "
                f"adopt_state=True.{'' if state or h.parameter.requires_grad else frozen} Nothing was loaded."
            )


def fits(state: State, held: Held) -> bool:
    """Whether a state in the plain form has the entries and the shapes of the optimizer's own."""
    if state.keys() != held.state.keys():
        return False
    ours, theirs = _shapes(held.state), _shapes(state)
    whole = {key: held.shape if held.is_like_parameter(key) else shape for key, shape in ours.items()}
    return all(theirs[key] in (ours[key], whole[key]) for key in ours)


def _differing(missing: Sequence[str], unknown: Sequence[str]) -> str:
    parts = [f"it lacks {some(missing)}"] * bool(missing) + [f"it has {some(unknown)} besides"] * bool(unknown)
    return " and ".join(parts)


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shapes(state: State) -> dict[str, Any]:
    """Shapes of tensors and numbers; what is neither, as it is."""
    shapes: dict[str, Any] = {key: () for key, value in state.items() if isinstance(value, int | float)}
    shapes |= {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    return {key: shapes.get(key, value) for key, value in state.items()}


def _words(state: State) -> str:
    return ", ".join(f"{key} {shape}" for key, shape in sorted(_shapes(state).items()))
