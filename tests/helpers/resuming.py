"""Runs that save checkpoints and go on from them, under every strategy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from lightning_namo import NAMOD, WarmupStableDecay, optimize_with
from lightning_namo.testing import layouts
from lightning_namo.testing.layouts import gathered_weights
from tests.helpers import toy
from tests.helpers.rules import RULES
from tests.helpers.strategies import (
    EXACT_HYPER,
    CPUFSDPStrategy,
    FullFSDPStrategy,
    fsdp2,
    model_parallel,
    tensor_parallel,
)

STEPS, SAVED_AT, SAMPLES = 5, 3, 6
ADOPTER = NAMOD  # goes on where AdamW stopped


class Experts(layouts.Experts):
    """All experts see everything. Wide ones: in float32 the polar factor of a square matrix is not known to 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.weight).tanh().sum(dim=1)


class ResumableNet(pl.LightningModule):
    """Matrices and AdamW's parameters take turns, one is frozen, and one is of a single row: an empty shard."""

    def __init__(self, optimizer: str, shard: Callable[[nn.Module, DeviceMesh], None] | None, share: tuple[int, int]):
        super().__init__()
        self.optimizer, self.shard, self.share = optimizer, shard, share
        self.up: nn.Linear | None = None
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS, SAMPLES, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randn(STEPS, SAMPLES, 3, generator=generator, dtype=torch.float64)

    def configure_model(self) -> None:
        if self.up is None:
            torch.manual_seed(0)
            self.up, self.norm = nn.Linear(6, 12).double(), nn.LayerNorm(12).double()
            self.frozen = nn.Linear(12, 12, bias=False).double().requires_grad_(False)
            self.mid, self.down = nn.Linear(12, 10).double(), nn.Linear(10, 3).double()
            self.gate = nn.Linear(12, 1, bias=False).double()
            self.experts = Experts(3, 12, 3, is_transposed=True).double()
            if self.shard is not None:
                self.shard(self, self.device_mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        part, parts = self.share
        dtype = self.up.weight.dtype  # float32 under FSDP1: Lightning's precision plugin makes it so
        x, y = (data[self.trainer.global_step][part::parts].to(dtype) for data in (self.x, self.y))
        hidden = self.frozen(self.norm(torch.tanh(self.up(x))))
        mixed = self.down(torch.tanh(self.mid(hidden))) * torch.sigmoid(self.gate(hidden))
        return nn.functional.mse_loss(mixed + self.experts(hidden), y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(STEPS))

    def configure_optimizers(self) -> Any:
        schedule = WarmupStableDecay(warmup=2, decay=2, total_steps=STEPS)
        if self.optimizer == "AdamW":
            return optimize_with(torch.optim.AdamW, schedule=schedule, lr=0.005)(self)
        adopt_state = self.optimizer == "adopter"
        cls = ADOPTER if adopt_state else RULES[self.optimizer]
        return optimize_with(cls, schedule=schedule, adopt_state=adopt_state, heads="matrix", **EXACT_HYPER)(self)


# name -> processes, strategy that saves, what shards the module. FSDP1 wraps every layer, so that it cuts every matrix,
# and that of a single row between two columns.
PLACES: dict[str, tuple[int, Callable[[], str | Strategy], Any]] = {
    "single": (1, lambda: "auto", None),
    "ddp 2": (2, lambda: "ddp", None),
    "fsdp1 2": (2, lambda: FullFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="full"), None),
    "fsdp1 2 sharded": (2, lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"), None),
    "fsdp2 2": (2, lambda: model_parallel(2, 1, False), fsdp2),
    "fsdp2 2 sharded": (2, lambda: model_parallel(2, 1, True), fsdp2),
    "fsdp2 1": (1, lambda: model_parallel(1, 1, False), fsdp2),
    "fsdp2 1 sharded": (1, lambda: model_parallel(1, 1, True), fsdp2),
    "fsdp2 3": (3, lambda: model_parallel(3, 1, False), fsdp2),
    "fsdp2 3 sharded": (3, lambda: model_parallel(3, 1, True), fsdp2),
    "tp 2": (2, lambda: model_parallel(1, 2, False), tensor_parallel),
    "tp 2 sharded": (2, lambda: model_parallel(1, 2, True), tensor_parallel),
    "single bf16": (1, lambda: "auto", None),
    "fsdp1 2 bf16": (2, lambda: FullFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="full"), None),
    "fsdp1 2 bf16 sharded": (2, lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"), None),
    "fsdp2 2 bf16": (2, lambda: model_parallel(2, 1, False), fsdp2),
    "fsdp2 2 bf16 sharded": (2, lambda: model_parallel(2, 1, True), fsdp2),
}


def fit(place: str, optimizer: str, folder: str, resume: str | None = None) -> dict[str, Tensor]:
    """Train to the last step, saving on the way, or from a checkpoint on; the whole weights."""
    devices, strategy, shard = PLACES[place]
    share = (0, 1) if devices == 1 or place.startswith("tp") else (dist.get_rank(), devices)
    module = ResumableNet(optimizer, shard, share)
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename=f"{place}-{optimizer}-{{step}}", every_n_train_steps=SAVED_AT, save_top_k=-1
    )
    trainer = toy.trainer(
        *([] if resume else [saver]),
        devices=devices,
        strategy=strategy(),
        max_steps=STEPS,
        precision="bf16-true" if "bf16" in place else None,
        enable_checkpointing=not resume,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=resume)
    assert trainer.global_step == STEPS
    for state in trainer.optimizers[0].state.values():
        assert all(state[key].dtype in (torch.float32, torch.float64) for key in ("step", "v") if key in state)
    return gathered_weights(trainer.strategy.model)


def checkpoint(place: str, optimizer: str, folder: str) -> str:
    return str(Path(folder, f"{place}-{optimizer}-step={SAVED_AT}.ckpt"))


def run_cases(rank: int, cases: list[tuple[str, str, str | None]], folder: str) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    answers = {}
    for to, optimizer, source in cases:
        saved_by = "AdamW" if optimizer == "adopter" else optimizer
        resume = None if source is None else checkpoint(source, saved_by, folder)
        answers[to, optimizer, source] = fit(to, optimizer, folder, resume)
    return answers


def readable(source: str, to: str) -> bool:
    """What Lightning's strategies read: full checkpoints all of them, sharded ones those of their own kind."""
    kind = {"fsdp1": "fsdp1", "fsdp2": "model parallel", "tp": "model parallel"}
    return "sharded" not in source or kind[source.split()[0]] == kind.get(to.split()[0])
