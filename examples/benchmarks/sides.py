"""The optimizers that `step.py` compares, by the names of its --sides."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, build_optimizer, orthogonalize, split_parameters

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.1, 0.95
KEYS: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
OURS = ("NAMO", "NAMO-D", "Muon", "AdaMuon")

Make = Callable[[nn.Module, DeviceMesh | None], list[Optimizer]]
MakeOfMatrices = Callable[[list[Tensor], list[Tensor], DeviceMesh | None], Optimizer]


@dataclass
class Side:
    """An optimizer to compare.

    Attributes:
        label: Its name in tables.
        make: From a module and the mesh that it is sharded over to what takes its step together.
        sharded: Whether it knows shards.
    """

    label: str
    make: Make
    sharded: bool = True


class Redundant(Optimizer):
    """Muon that gathers every matrix on every rank: what is simple, and repeats the work R times."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        for parameter in params:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Gather, orthogonalize everything, keep the own part."""
        params = self.param_groups[0]["params"]
        full = []
        for parameter in params:
            momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            full.append(torch.lerp(parameter.grad, momentum, MOMENTUM).to(torch.bfloat16).full_tensor())
        for parameter, polar in zip(params, orthogonalize(full), strict=True):
            local = distribute_tensor(polar, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
            scale = 0.2 * max(parameter.shape) ** 0.5
            parameter.to_local().mul_(1 - LR * WEIGHT_DECAY).add_(local, alpha=-LR * scale)


def find_sides(
    ranks: int, authors: Path | None = None, dion: Path | None = None, their_adamw: bool = False
) -> tuple[dict[str, Side], list[str]]:
    """The sides that there are, and notes on those that there are not.

    Args:
        ranks: Number of processes; with several parameters are sharded.
        authors: Checkout of the authors' code.
        dion: Checkout of dion.
        their_adamw: Whether sides with an AdamW of their own use it, in place of torch's fused one.
    """
    notes = []
    sides = {
        "namo": Side("NAMO", _ours(NAMO)),
        "namo-d": Side("NAMO-D", _ours(NAMOD)),
        "muon": Side("Muon", _ours(Muon)),
        "adamuon": Side("AdaMuon", _ours(AdaMuon)),
        "torch": Side("torch.optim.Muon", _beside_adamw(_torch_muon)),
        "adamw": Side("fused AdamW", lambda module, mesh: [_adamw(module.parameters())]),
    }
    if ranks > 1:
        sides["redundant"] = Side("redundant", _beside_adamw(lambda matrices, rest, mesh: Redundant(matrices)))
    if importlib.util.find_spec("pytorch_optimizer"):
        sides["pytorch-optimizer"] = Side("pytorch_optimizer", _beside_adamw(_pytorch_optimizer_muon, their_adamw))
    else:
        notes.append("pytorch_optimizer is not installed (pip install pytorch_optimizer): its Muon is left out.")
    if authors:
        namo = _load(authors / "src" / "namo.py", "authors_namo")
        for key, label, cls in (("namo", "authors' NAMO", namo.NAMO), ("namo-d", "authors' NAMO-D", namo.NAMO_D)):
            sides[f"authors-{key}"] = Side(label, _beside_adamw(_authors(cls), their_adamw), sharded=False)
        if ranks > 1:
            notes.append("The authors' code knows no shards: it works on whole matrices on every rank, as under DDP.")
    if dion:
        sys.path.insert(0, str(dion))
        sides["dion"] = Side("dion's Muon", _beside_adamw(_dion_muon, their_adamw))
    if (authors or dion) and _compiles():
        notes.append("torch.compile works here: others' code is compiled where it asks for that.")
    elif authors or dion:
        torch.compiler.set_stance("force_eager")
        notes.append("torch.compile does not work here (on a CPU it needs a C++ compiler): all code runs eagerly.")
    return sides, notes


def _ours(cls: Callable[..., Optimizer]) -> Make:
    return lambda module, mesh: [build_optimizer(module, cls, **KEYS)]


def _beside_adamw(make: MakeOfMatrices, own_adamw: bool = False) -> Make:
    """A side that trains the matrices, and the rest itself or beside torch's fused AdamW."""

    def both(module: nn.Module, mesh: DeviceMesh | None) -> list[Optimizer]:
        groups = split_parameters(module)
        matrices = [p for group in groups if group["orthogonalize"] for _, p in group["params"]]
        rest = [p for group in groups if not group["orthogonalize"] for _, p in group["params"]]
        if own_adamw:
            return [make(matrices, rest, mesh)]
        return [make(matrices, [], mesh), *([_adamw(rest)] if rest else [])]

    return both


def _adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, betas=(0.9, 0.95), fused=True, **KEYS)


def _torch_muon(matrices: list[Tensor], rest: list[Tensor], mesh: DeviceMesh | None) -> Optimizer:
    return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **KEYS)


def _pytorch_optimizer_muon(matrices: list[Tensor], rest: list[Tensor], mesh: DeviceMesh | None) -> Optimizer:
    groups = [{"params": params, "use_muon": params is matrices} for params in (matrices, rest) if params]
    cls = importlib.import_module("pytorch_optimizer").Muon
    return cls(groups, use_adjusted_lr=True, adamw_lr=LR, adamw_wd=WEIGHT_DECAY, **KEYS)


def _authors(cls: Callable[..., Optimizer]) -> MakeOfMatrices:
    return lambda matrices, rest, mesh: cls(lr=LR, wd=WEIGHT_DECAY, muon_params=matrices, adamw_params=rest)


def _dion_muon(matrices: list[Tensor], rest: list[Tensor], mesh: DeviceMesh | None) -> Optimizer:
    algorithms = ((matrices, "muon"), (rest, "adamw"))
    groups = [{"params": params, "algorithm": algorithm} for params, algorithm in algorithms if params]
    cls = importlib.import_module("dion.muon").Muon
    return cls(groups, distributed_mesh=mesh, nesterov=True, adjust_lr="rms_norm", **KEYS)


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiles() -> bool:
    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one)(torch.zeros(2))
    except Exception:  # whatever the compiler's trouble is
        return False
    return os.environ.get("TORCHDYNAMO_DISABLE") != "1"
