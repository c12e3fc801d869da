"""The rule of the examples: after its paper, by every way to an optimizer, and on two processes."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_namo import OptimizerCallback, build_optimizer, optimize_with
from tests.helpers.forked import run_python
from tests.helpers.optimizers import randn
from tests.helpers.paths import ROOT
from tests.reference import polar

EXAMPLES = ROOT / "examples"


def normuon() -> Any:
    spec = importlib.util.spec_from_file_location("own_rule", EXAMPLES / "own_rule.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["own_rule"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.NorMuon


def test_it_is_the_rule_of_the_paper() -> None:
    p = nn.Parameter(randn(6, 4, dtype=torch.float64))
    optimizer = normuon()([p], lr=0.1, orthogonalizer="svd")
    W, M, v = p.detach().clone(), torch.zeros(6, 4).double(), torch.zeros(6, 1).double()
    for step in range(4):
        p.grad = G = randn(6, 4, seed=step + 1, dtype=torch.float64)
        optimizer.step()
        M = 0.95 * M + 0.05 * G
        O = polar(0.95 * M + 0.05 * G)
        v = 0.95 * v + 0.05 * O.square().mean(dim=1, keepdim=True)
        U = O / (v.sqrt() + 1e-8)
        W = W * (1 - 0.01) - 0.1 * 0.2 * 24**0.5 / U.norm() * U
    torch.testing.assert_close(p.detach(), W, rtol=1e-7, atol=1e-7)


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch: Any) -> Any:
        return self.net(batch[0]).sub(batch[0][:, :4]).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(randn(64, 8)), batch_size=16)


def fit(module: pl.LightningModule, **options: Any) -> list[torch.Tensor]:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module)
    assert type(trainer.optimizers[0]).__name__ == "NorMuon"
    return [p.detach().clone() for p in module.parameters()]


def test_one_line_a_callback_and_plain_pytorch_train_with_it_alike() -> None:
    cls = normuon()

    class Own(Regression):
        configure_optimizers = optimize_with(cls, lr=0.02)

    torch.manual_seed(0)
    module, twin, plain = Own(), Regression(), Regression()
    twin.load_state_dict(module.state_dict())
    plain.load_state_dict(module.state_dict())
    by_line = fit(module)
    by_callback = fit(twin, callbacks=[OptimizerCallback(partial(cls, lr=0.02))])
    optimizer = build_optimizer(plain, cls, lr=0.02)
    for _ in range(2):
        for batch in plain.train_dataloader():
            optimizer.zero_grad()
            plain.training_step(batch).backward()
            optimizer.step()
    for p, q, r in zip(by_line, by_callback, plain.parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r.detach())


@pytest.mark.slow
def test_the_command_line_trains_with_it_on_one_process_and_sharded_over_two(data: Path, tmp_path: Path) -> None:
    losses = []
    for layer in ([], ["--config", str(ROOT / "configs" / "strategy" / "fsdp2.yaml"), "--trainer.devices", "2"]):
        command = ["-m", "lightning_namo", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *layer]
        command += ["--optim.optimizer", "own_rule.NorMuon", "--optim.optimizer.orthogonalizer", "svd"]
        batch = "8" if layer else "16"
        command += ["--trainer.max_steps", "4", "--data.batch_size", batch, "--trainer.limit_val_batches", "2"]
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        (folder / "data").symlink_to(data)
        command += ["--trainer.default_root_dir", str(folder)]
        done = run_python(command, folder, PYTHONPATH=str(EXAMPLES))
        assert done.returncode == 0, done.stderr
        losses.append(float(re.findall(r"train/loss: (\d+\.\d+)", done.stdout)[-1]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
