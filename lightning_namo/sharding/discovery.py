"""Where the shards of a module's parameters are: read from DTensors and from the flat parameters of FSDP1."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.layout import FlatRange, Rectangle, ShardRegion, stored_shape
from lightning_namo.sharding.local import local_tensor

_MATRIX_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def is_fsdp2(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP2, whose class then has the module's own two places further on."""
    return isinstance(module, FSDPModule)


def reshard(module: nn.Module) -> None:
    """Let a module's FSDP2 units show their sharded parameters.

    After a forward pass outside training the root, at least, keeps its whole parameters registered until the next
    backward pass: they have no gradients, and are not the optimizer's.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def shard_counts(module: nn.Module, parameters: Sequence[Tensor]) -> list[int]:
    """Over how many ranks each parameter is sharded; 1 where every rank holds all of it.

    Args:
        module: The parameters' module with its outermost FSDP1 unit, which knows the flat ranges.
        parameters: Parameters of the module.
    """
    counts: dict[Tensor, int] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is not None and handle.uses_sharded_strategy:
            sharded = (handle.flat_param, *(handle.flat_param._params or ()))
            counts |= dict.fromkeys(sharded, handle.process_group.size())
    for p in parameters:
        if isinstance(p, DTensor):
            counts[p] = math.prod(p.device_mesh.size(i) for i, cut in enumerate(p.placements) if hasattr(cut, "dim"))
    return [counts.get(parameter, 1) for parameter in parameters]


def region_of(parameter: Tensor, name: str = "a parameter") -> tuple[tuple[int, ...], ShardRegion | Box]:
    """Full shape of a plain or DTensor parameter, and the region that this process holds.

    Raises:
        ValueError: For a placement of partial sums.
    """
    shape = tuple(parameter.shape)
    rows, cols = stored_shape(shape)
    if not isinstance(parameter, DTensor):
        return shape, Rectangle(0, rows, 0, cols)
    placements = parameter.placements
    sharded = {p.dim for p in placements if hasattr(p, "dim")}
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"Expected {name} {shape} to be replicated or sharded, but its placements are {placements}. Shard it over "
            "dimension 0 or 1, or route it to AdamW (adamw=...)."
        )
    local, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, placements)
    if any(dim > 1 for dim in sharded):
        return shape, Box(shape, tuple(offset), tuple(local))
    if math.prod(local) == 0:
        return shape, Rectangle(0, 0, 0, 0)
    inner = math.prod(shape[2:])
    row, col = (offset[0] if shape else 0), (offset[1] * inner if len(shape) > 1 else 0)
    return shape, Rectangle(row, row + stored_shape(local)[0], col, col + stored_shape(local)[1])


def part_of(parameter: Tensor, region: ShardRegion | Box | None) -> Hashable:
    """A value that differs between different parts of a parameter; None where this rank holds nothing of it.

    Args:
        parameter: As the strategy left it; any placement that torch can locate.
        region: The local part, where it is known (under FSDP1 the parameter does not know).
    """
    if not local_tensor(parameter).numel():
        return None
    if region is not None:
        return region
    if not isinstance(parameter, DTensor):
        return "whole"
    shape, mesh, placements = tuple(parameter.shape), parameter.device_mesh, parameter.placements
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local), tuple(offset)


def find_regions(module: nn.Module) -> dict[nn.Parameter, tuple[tuple[int, ...], ShardRegion | Box]]:
    """Full shape and local region of every parameter of a module, under whatever strategy it is trained.

    Plain parameters are whole; DTensors (FSDP2, HSDP, tensor parallelism) have their placements; FSDP1's flat ranges
    are read from its flat parameters, since a one-dimensional shard does not know its matrix.

    Raises:
        ValueError: For FSDP1 without ``use_orig_params=True`` or without its outermost unit, or a placement that
            cannot be served.
    """
    regions: dict[nn.Parameter, tuple[tuple[int, ...], ShardRegion | Box]] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None or handle.flat_param._params is None:
            continue
        flat = handle.flat_param
        for parameter, info, full in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):  # type: ignore[arg-type]
            shape, (rows, width) = tuple(full), stored_shape(full)
            if parameter.shape == full:
                regions[parameter] = (shape, Rectangle(0, rows, 0, width))
            elif info.intra_param_start_idx is not None and info.intra_param_end_idx is not None:
                flat_range = FlatRange(info.intra_param_start_idx, info.intra_param_end_idx + 1, width)
                regions[parameter] = (shape, flat_range)
            else:
                regions[parameter] = (shape, FlatRange(0, 0, width))
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None) if isinstance(layer, _MATRIX_LAYERS) else None
        lazy = isinstance(weight, nn.parameter.UninitializedParameter)
        if isinstance(weight, nn.Parameter) and not lazy and weight.dim() == 1 and weight not in regions:
            raise ValueError(
                f"Expected {name}.weight to have at least 2 dimensions but it has 1: FSDP cut it to a run, and the "
                "FSDP unit that knows the matrix is outside of the module. Pass the outermost FSDP module."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, FlatParameter):
            raise ValueError(
                f"Expected FSDP with use_orig_params=True, but {name} is a flat parameter: the matrices in it "
                "cannot be told apart. Pass use_orig_params=True to FSDP (Lightning's FSDPStrategy does)."
            )
        if parameter not in regions:
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"Expected {name} to be initialized: run one dummy forward pass first.")
            regions[parameter] = region_of(parameter, name)
    return regions


def holds_fsdp1(module: nn.Module | None) -> bool:
    """Whether a module has FSDP1 units."""
    return module is not None and any(isinstance(m, FullyShardedDataParallel) for m in module.modules())
