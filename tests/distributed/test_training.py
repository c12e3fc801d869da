"""Accumulation without synchronization and averaged weights on two processes, as with AdamW."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, Subset

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, OptimizerCallback, build_optimizer
from tests.helpers import toy
from tests.helpers.launch import run_ranks
from tests.helpers.strategies import EXACT_HYPER, Regression, RegressionNet
from tests.helpers.worker import relative_error

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **{cls.__name__: functools.partial(cls, **EXACT_HYPER) for cls in (NAMO, NAMOD, Muon, AdaMuon)},
    "AdamW": functools.partial(AdamW, lr=0.02),
}
ACCUMULATED, STEPS = 3, 4


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.detach().clone() for name, p in module.named_parameters()}


def start() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 13), nn.LayerNorm(13), nn.Tanh(), nn.Linear(13, 3)).double()


def accumulate(share: int, shares: int, name: str, how: str) -> dict[str, Tensor]:
    """Take steps of accumulated batches, synchronizing each batch, or the last only."""
    inner, data = start(), Regression()
    fabric = Fabric(accelerator="cpu", devices=shares, strategy="ddp") if how.startswith("fabric") else None
    if fabric is not None:
        fabric.launch()
        module: Any = fabric.setup_module(inner)
        optimizer: Any = fabric.setup_optimizers(build_optimizer(module, OPTIMIZERS[name]))
    else:
        module = DistributedDataParallel(inner) if shares > 1 else inner
        optimizer = build_optimizer(module, OPTIMIZERS[name])
    for batch in range(ACCUMULATED * STEPS):
        last = batch % ACCUMULATED == ACCUMULATED - 1
        rows = slice(4 * batch + share, 4 * batch + 4, shares)

        def backward(rows: slice = rows) -> None:
            loss = nn.functional.mse_loss(module(data.x[rows]), data.y[rows]) / ACCUMULATED
            loss.backward() if fabric is None else fabric.backward(loss)

        if how == "fabric without sync":
            with fabric.no_backward_sync(module, enabled=not last):
                backward()
        elif how == "without sync" and not last:
            with module.no_sync():
                backward()
        else:
            backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return weights(inner)


HOW = ("in step", "without sync", "fabric in step", "fabric without sync")


def accumulations(rank: int) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    return {(name, how): accumulate(rank, 2, name, how) for name in OPTIMIZERS for how in HOW}


@functools.cache
def accumulated() -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(accumulations, 2, timeout=200)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_without_synchronization_trains_as_one_process(name: str, how: str) -> None:
    expected, before = accumulate(0, 1, name, "in step"), weights(start())
    for answer in accumulated():
        for key, weight in answer[name, how].items():
            assert relative_error(weight, expected[key]) < 1e-9, key
            assert relative_error(weight, before[key]) > 1e-3, key
    first, second = (answer[name, how] for answer in accumulated())
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Trained(pl.Callback):
    """The weights when training ends, before those of the average take their place."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights(pl_module)


def averaged_run(name: str, share: int, shares: int, folder: Path | None, resume: Path | None) -> tuple[Any, Any]:
    """Weights as trained, and their average, after six steps."""
    trained, module = Trained(), RegressionNet()
    saving = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)]
    trainer = toy.trainer(
        OptimizerCallback(OPTIMIZERS[name]),
        trained,
        EMAWeightAveraging(decay=0.6),
        *saving,
        devices=shares,
        strategy="ddp" if shares > 1 else "auto",
        max_epochs=3,
        enable_checkpointing=bool(saving),
        use_distributed_sampler=False,
    )
    rows = [i for i in range(16) if i % shares == share]  # two batches of eight an epoch
    loader = DataLoader(Subset(Regression(), rows), batch_size=8 // shares)
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    assert trainer.global_step == 6
    return trained.weights, weights(module)


def averaged_runs(rank: int, folder: Path) -> dict[Any, Any]:
    os.environ.update(NODE_RANK="0")
    answers = {}
    for name in OPTIMIZERS:
        answers[name, "whole"] = averaged_run(name, rank, 2, folder / name, None)
        dist.barrier()
        answers[name, "resumed"] = averaged_run(name, rank, 2, None, folder / name / "step=4.ckpt")
    return answers


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(averaged_runs, 2, tmp_path_factory.mktemp("averaged"), timeout=200)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_averaged_weights_under_ddp_are_one_process_s_and_resume(name: str, averaged: list[dict[Any, Any]]) -> None:
    trained, average = averaged_run(name, 0, 1, None, None)
    for answer in averaged:
        for expected, found in zip((trained, average), answer[name, "whole"], strict=True):
            assert max(relative_error(found[key], expected[key]) for key in expected) < 1e-9
        torch.testing.assert_close(answer[name, "resumed"], answer[name, "whole"], rtol=0, atol=0)
    assert relative_error(average["up.weight"], trained["up.weight"]) > 1e-4
