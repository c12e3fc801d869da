"""A small LightningModule, its data and a quiet trainer, for the tests of the Lightning glue."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)  # the matrices of these tests are small: threads would only wait for one another

BATCHES, BATCH_SIZE = 6, 4
HYPER = {"lr": 0.02, "adamw_lr": 0.005, "weight_decay": 0.2}


def batches(poisoned: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """The batches (x, y) of an epoch; those with numbers in `poisoned` hold a NaN."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCHES, BATCH_SIZE, 8, generator=generator)
    y = torch.randn(BATCHES, BATCH_SIZE, 3, generator=generator)
    x[list(poisoned), 0, 0] = torch.nan
    return list(zip(x, y, strict=True))


class Net(pl.LightningModule):
    """A backbone and a head, with matrices and biases in both, and no configure_optimizers."""

    def __init__(self, poisoned: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.poisoned = poisoned
        generator = torch.Generator().manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 10))
        self.head = nn.Linear(10, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def train_dataloader(self) -> DataLoader:
        x, y = (torch.cat(part) for part in zip(*batches(self.poisoned), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


class SgdNet(Net):
    """The same with an optimizer of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Resumable:
    """The batches as an iterable that a checkpoint can resume in the middle of an epoch."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:  # the Trainer counts
            self.position += 1
            yield batches()[(self.position - 1) % BATCHES]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def trainer(*callbacks: pl.Callback, **options: object) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **quiet | options)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: object) -> pl.Trainer:
    """Fit with the callbacks and the Trainer's options; gives the trainer."""
    fitting = trainer(*callbacks, **options)
    fitting.fit(module)
    return fitting


def checkpoints(folder: Path, **options: object) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def assert_same(actual: object, expected: object) -> None:
    """Equal bit by bit: modules, optimizers, or what torch.testing.assert_close takes."""
    if isinstance(actual, nn.Module):
        actual, expected = actual.state_dict(), expected.state_dict()
    if isinstance(actual, torch.optim.Optimizer):
        actual, expected = actual.state_dict(), expected.state_dict()
        assert actual.pop("param_groups") == expected.pop("param_groups")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def train_plainly(module: Net, optimizer: torch.optim.Optimizer, epochs: int = 2) -> Net:
    for batch in batches() * epochs:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    return module


def net_with(configure: object) -> Net:
    return type("Configured", (Net,), {"configure_optimizers": configure})()
