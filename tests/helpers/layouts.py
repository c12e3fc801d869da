"""A module of odd matrices whose gradient can be prescribed, under every layout that the optimizers serve."""

from __future__ import annotations

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


class Probe(nn.Module):
    """Holds a layer; its output's derivative by each of the layer's parameters is what was put in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=next(self.parameters()).dtype)
        for name, parameter in self.layer.named_parameters():
            grad = grads[name]
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                total = total + (parameter * grad).sum().full_tensor()
            else:
                total = total + (parameter * grad).sum()
        return total


class Odd(nn.Module):
    """Uneven over 2, 3 and 4 ranks: fewer rows than ranks, convolutions, transposed storage, fused blocks."""

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

    def forward(self, grads: dict[str, dict[str, Tensor]]) -> Tensor:
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


def prescribed_gradients(module: nn.Module, step: int) -> dict[str, dict[str, Tensor]]:
    """Full gradients of an unsharded module for a step, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: {
            key: torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.1 * (step + 1)
            for key, p in child.layer.named_parameters()
        }
        for name, child in module.named_children()
    }


def shard_children(module: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """FSDP2 with a unit for every child and one for the rest."""
    for child in module.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


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
    plan = {"tall": ColwiseParallel, "fused": ColwiseParallel, "wide": RowwiseParallel, "few": RowwiseParallel}
    for name, style in plan.items():
        if hasattr(module, name):
            parallelize_module(getattr(module, name), mesh, {"layer": style()})


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
    return parameter.detach().redistribute(placements=[Replicate()] * parameter.device_mesh.ndim).to_local()
