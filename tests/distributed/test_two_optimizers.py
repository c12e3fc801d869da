"""Two optimizers in one LightningModule, as a GAN has: trained, saved and resumed, or refused, under every strategy."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_namo import NAMO, NAMOD, build_optimizer
from lightning_namo.testing.layouts import gathered_weights
from tests.helpers import toy
from tests.helpers.launch import run_ranks
from tests.helpers.resuming import PLACES, readable
from tests.helpers.strategies import EXACT_HYPER
from tests.helpers.worker import relative_error

STEPS, SAVED_AT = 4, 2  # of both optimizers together: Lightning counts each
PLAIN, SHARDED = ("single", "ddp 2"), ("fsdp2 2", "fsdp2 2 sharded")
TO = (*PLAIN, "fsdp2 2")


class Pair(pl.LightningModule):
    """A generator and a critic of the same names, each with an optimizer of its own."""

    def __init__(self, shard: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.shard, self.generator = shard, None
        self.critic: nn.Module | None = None

    def configure_model(self) -> None:
        if self.generator is None:
            torch.manual_seed(0)
            self.generator, self.critic = (
                nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).double() for _ in range(2)
            )
            if self.shard is not None:
                self.shard(self, self.device_mesh)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            build_optimizer(self.generator, NAMO, **EXACT_HYPER),
            build_optimizer(self.critic, NAMOD, **EXACT_HYPER),
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(self.trainer.global_step // 2)
        x = torch.randn(3, 6, generator=generator, dtype=torch.float64).to(self.generator[0].weight.dtype)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(torch.tanh(self.critic(torch.tanh(self.generator(x)))).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(STEPS))


def fit(place: str, folder: str, resume: str | None) -> dict[str, Tensor] | str:
    devices, strategy, shard = PLACES[place]
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename=f"{place}-{{step}}", every_n_train_steps=2 * SAVED_AT, save_top_k=-1
    )
    module = Pair(shard)
    trainer = toy.trainer(
        *([] if resume else [saver]),
        devices=devices,
        strategy=strategy(),
        max_steps=2 * STEPS,
        enable_checkpointing=not resume,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(
            module, ckpt_path=None if resume is None else str(Path(folder, f"{resume}-step={2 * SAVED_AT}.ckpt"))
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return gathered_weights(trainer.strategy.model)


def run_pairs(rank: int, cases: list[tuple[str, str | None]], folder: str) -> dict[Any, Any]:
    os.environ.update(NODE_RANK="0")
    return {case: fit(case[0], folder, case[1]) for case in cases}


@functools.cache
def answers(folder: str) -> dict[Any, Any]:
    """What each run ends with, as (strategy, strategy of its checkpoint); all checkpoints are written first."""
    found: dict[Any, Any] = {}
    for sources in ((None,), (*PLAIN, *SHARDED)):
        for world in (1, 2):
            places = [place for place in (*PLAIN, *SHARDED) if PLACES[place][0] == world]
            cases = [(p, s) for p in places for s in sources if s is None or (p in TO and readable(s, p))]
            found |= run_ranks(run_pairs, world, cases, folder)[0]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(
    ("to", "source"), [(to, s) for to in TO for s in (None, *PLAIN, *SHARDED) if not s or readable(s, to)]
)
def test_two_optimizers_train_and_resume_as_on_one_device_or_are_refused(
    to: str, source: str | None, folder: str
) -> None:
    found, expected = answers(folder)[to, source], answers(folder)["single", None]
    if source in PLAIN and to in SHARDED:  # Lightning reads the ids by the whole module, of which each has a part
        assert found.startswith("RuntimeError: Missing optimizer state for parameter 'critic.0.weight' in checkpoint")
        return
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) <= 1e-12
