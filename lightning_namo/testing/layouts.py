"""A module of odd matrices whose gradient can be prescribed, under every layout that the optimizers serve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.routing.names import clean_name
from lightning_namo.sharding.layout import stored_shape
from lightning_namo.sharding.local import local_tensor


class Probe(nn.Module):
    """Holds a layer; its output's derivative by each of the layer's parameters is what was put in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        """The sum of all parameters' products with what their gradients are to be."""
        total = torch.zeros((), dtype=next(self.parameters()).dtype)
        for name, parameter in self.layer.named_parameters():
            grad = grads[name]
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                product: Any = parameter * grad
                total = total + product.sum().full_tensor()
            else:
                total = total + (parameter * grad).sum()
        return total


class Experts(nn.Module):
    """A batch of matrices in a bare parameter, as transformers keeps experts."""

    def __init__(self, count: int, rows: int, columns: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(count, rows, columns))


class Odd(nn.Module):
    """Uneven over 2, 3 and 4 ranks: fewer rows than ranks, convolutions, transposed storage, fused blocks, experts."""

    blocks: ClassVar[dict[str, int | list[int]]] = {"fused.layer.weight": [9, 5, 5]}

    def __init__(self) -> None:
        super().__init__()
        self.embed = Probe(nn.Embedding(11, 6))
        self.tall = Probe(nn.Linear(10, 23))
        self.wide = Probe(nn.Linear(23, 7))
        self.few = Probe(nn.Linear(13, 3))
        self.row = Probe(nn.Linear(9, 1, bias=False))
        self.conv = Probe(nn.Conv2d(3, 5, 2))
        self.deconv = Probe(nn.ConvTranspose1d(4, 6, 3))
        self.fused = Probe(nn.Linear(8, 19))
        self.norm = Probe(nn.LayerNorm(5))
        self.experts = Probe(Experts(5, 3, 4))
        self.turned = Probe(Experts(2, 4, 3, is_transposed=True))
        self.groups = Probe(nn.Conv1d(6, 9, 2, groups=3))

    def forward(self, grads: dict[str, dict[str, Tensor]]) -> Tensor:
        """The sum over the layers."""
        return sum((child(grads[name]) for name, child in self.named_children()), torch.zeros(()))


class Even(Odd):
    """Divides evenly over 2, 3 and 4 ranks in both dimensions, as Shard(1) demands."""

    blocks: ClassVar[dict[str, int | list[int]]] = {"fused.layer.weight": 3}

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed = Probe(nn.Embedding(12, 12))
        self.tall = Probe(nn.Linear(12, 24))
        self.wide = Probe(nn.Linear(24, 12))
        self.conv = Probe(nn.Conv2d(12, 12, 2, bias=False))
        self.deconv = Probe(nn.ConvTranspose1d(12, 24, 2, bias=False))
        self.fused = Probe(nn.Linear(12, 36))
        self.norm = Probe(nn.LayerNorm(12))
        self.experts = Probe(Experts(4, 12, 6))
        self.turned = Probe(Experts(3, 12, 4, is_transposed=True))


def prescribed_gradients(module: nn.Module, step: int) -> dict[str, dict[str, Tensor]]:
    """Full gradients of an unsharded module for a step, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1000 + step)
    children: Any = module.named_children()
    return {
        name: {
            key: torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.1 * (step + 1)
            for key, p in child.layer.named_parameters()
        }
        for name, child in children
    }


def shard_children(module: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """FSDP2 with a unit for every child and one for the rest."""
    for child in module.children():
        fully_shard(child, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    return module


def _ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def _fsdp1(module: nn.Module) -> nn.Module:
    for name in ("tall", "conv", "fused"):  # flat parameters of their own; the rest share the root's
        setattr(module, name, FSDP(getattr(module, name), use_orig_params=True, device_id=torch.device("cpu")))
    return FSDP(module, use_orig_params=True, device_id=torch.device("cpu"))


def _fsdp2(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return shard_children(module, mesh)


def _fsdp2_shard1(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() > 1 else None

    return shard_children(module, mesh, shard_placement_fn=placement)


def _hsdp(module: nn.Module) -> nn.Module:
    world_size = dist.get_world_size()
    shards = 2 if world_size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))
    return shard_children(module, mesh)


def _tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    """Rows of the tall and the fused layer, columns of the wide ones; norms, convolutions and embeddings stay whole."""
    rows, columns = ("tall", "fused"), ("wide", "few")
    plan: dict[str, Any] = {**dict.fromkeys(rows, ColwiseParallel), **dict.fromkeys(columns, RowwiseParallel)}
    for name, style in plan.items():
        if hasattr(module, name):
            parallelize_module(getattr(module, name), mesh, {"layer": style()})
    for name, dim in {"experts": 0, "turned": 2}.items():
        layer: Any = getattr(module, name).layer
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))


def _tp(module: nn.Module) -> nn.Module:
    _tensor_parallel(module, init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def _fsdp2_tp(module: nn.Module) -> nn.Module:
    world_size = dist.get_world_size()
    tp = 2 if world_size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(module, mesh["tp"])
    return shard_children(module, mesh["dp"])


LAYOUTS: dict[str, tuple[type[Odd], Callable[[nn.Module], nn.Module]]] = {
    "ddp": (Odd, _ddp),
    "fsdp1": (Odd, _fsdp1),
    "fsdp2-even": (Even, _fsdp2),
    "fsdp2-uneven": (Odd, _fsdp2),
    "fsdp2-shard1": (Even, _fsdp2_shard1),
    "hsdp": (Odd, _hsdp),
    "tp": (Odd, _tp),
    "fsdp2+tp": (Odd, _fsdp2_tp),
}


def whole(parameter: Tensor) -> Tensor:
    """A DTensor's full value, or the tensor itself."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    replicated = parameter.redistribute(placements=[Replicate()] * parameter.device_mesh.ndim)
    return replicated.to_local().detach()


def new_module(kind: type[Odd], dtype: torch.dtype) -> Odd:
    """A module with the same weights wherever it is made."""
    torch.manual_seed(0)
    return kind().to(dtype)


def gathered_state(optimizer: OrthogonalizedOptimizer) -> dict[str, dict[str, Tensor]]:
    """Whole state of every matrix: parameter-shaped states are put together from all ranks' regions."""
    parameters = [p for p in optimizer._parameter_states() if p.group["orthogonalize"]]
    result: dict[str, dict[str, Tensor]] = {clean_name(p.name): {} for p in parameters}
    stored: dict[tuple[str, str], tuple[int, int]] = {}
    ours: dict[tuple[str, str], tuple[Any, Tensor]] = {}
    for parameter in parameters:
        name = clean_name(parameter.name)
        for key, value in parameter.state.items():
            part = local_tensor(value)
            if parameter.is_like_parameter(key):
                stored[name, key] = stored_shape(parameter.shape)
                ours[name, key] = parameter.region, part.reshape(-1)
            else:
                result[name][key] = part
    parts = [ours]
    if dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, ours)
    for name, key in ours:
        full = torch.full(stored[name, key], torch.nan, dtype=ours[name, key][1].dtype)
        for of_rank in parts:
            region, part = of_rank[name, key]
            region.of(full).copy_(part.view(region.of(full).shape))
        result[name][key] = full
    return result


def gathered_weights(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name."""
    sharded = isinstance(module, FSDP)
    with FSDP.summon_full_params(module, writeback=False) if sharded else contextlib.nullcontext():
        named = [(clean_name(name).removeprefix("module."), parameter) for name, parameter in module.named_parameters()]
        return {name: whole(parameter).clone() for name, parameter in named}
