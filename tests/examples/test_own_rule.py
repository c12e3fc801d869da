"""The rules of the examples: after their papers, by every way to an optimizer, and on two processes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_namo import OptimizerCallback, build_optimizer, optimize_with
from lightning_namo.testing import check_rule
from tests import reference
from tests.helpers.forked import run_python
from tests.helpers.optimizers import randn
from tests.helpers.paths import ROOT
from tests.helpers.rules import MuonH, NorMuon

EXAMPLES = ROOT / "examples"
EXAMPLE_RULES = {"own_rule": NorMuon, "hyperball": MuonH}
of_both = pytest.mark.parametrize(("file", "cls"), EXAMPLE_RULES.items())


@of_both
def test_it_is_a_file_of_at_most_40_lines(file: str, cls: Any) -> None:
    assert len((EXAMPLES / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= 40


def box(W: Tensor, gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from reference.normuon(W, gradients, eta=1e-3)


def sphere(W: Tensor, gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from reference.muon_hyperball(W, gradients, eta=0.01)


@pytest.mark.parametrize(("cls", "paper"), [(NorMuon, box), (MuonH, sphere)])
def test_it_is_the_rule_of_its_paper(cls: Any, paper: Any) -> None:
    check_rule(partial(cls, orthogonalizer="svd"), paper, rtol=1e-9)


def test_hyperball_holds_the_norms_of_weight_and_update() -> None:
    p = nn.Parameter(randn(6, 4))
    optimizer, radius = MuonH([p], lr=0.1), p.norm()
    for step in range(5):
        p.grad, before = randn(6, 4, seed=step + 1), p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(p.norm(), radius)
        torch.testing.assert_close((p - before).norm(), 0.1 * radius, rtol=0.2, atol=0)  # and back to the sphere


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
    assert type(trainer.optimizers[0]) in (NorMuon, MuonH)
    return [p.detach().clone() for p in module.parameters()]


@of_both
def test_one_line_a_callback_and_plain_pytorch_train_with_it_alike(file: str, cls: Any) -> None:
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
@of_both
def test_the_command_line_trains_with_it_on_one_process_and_sharded_over_two(
    file: str, cls: Any, data: Path, tmp_path: Path
) -> None:
    losses = []
    for layer in ([], ["--config", str(ROOT / "configs" / "strategy" / "fsdp2.yaml"), "--trainer.devices", "2"]):
        command = ["-m", "lightning_namo", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *layer]
        command += ["--optim.optimizer", f"{file}.{cls.__name__}", "--optim.optimizer.orthogonalizer", "svd"]
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
