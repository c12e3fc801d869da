"""Lightning's strategies, on real processes: the one line and the callback train as on one device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset

from lightning_namo import NAMO, NAMOD, OptimizerCallback, WarmupStableDecay, build_optimizer, optimize_with
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.worker import clean, relative_error, whole

HYPER: dict[str, Any] = {"lr": 0.02, "orthogonalizer": "svd", "adamw_lr": 0.005}
SCHEDULE = WarmupStableDecay(warmup=2, decay=2, total_steps=6)


class Regression(Dataset[tuple[Tensor, Tensor]]):
    """The same 48 samples everywhere."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(48, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randn(48, 3, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Net(pl.LightningModule):
    """Two hidden layers; ``shard`` says how `configure_model` distributes them."""

    def __init__(self, shard: Callable[[pl.LightningModule, DeviceMesh], None] | None = None) -> None:
        super().__init__()
        self.up: nn.Linear | None = None
        self.shard = shard

    def configure_model(self) -> None:
        if self.up is None:
            torch.manual_seed(0)
            self.up, self.norm = nn.Linear(6, 13).double(), nn.LayerNorm(13).double()
            self.mid, self.down = nn.Linear(13, 10).double(), nn.Linear(10, 3).double()
            if self.shard is not None:
                self.shard(self, self.device_mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.norm(torch.tanh(self.up(x)))
        return nn.functional.mse_loss(self.down(torch.tanh(self.mid(hidden))), y)


class WithTheLine(Net):
    """The same with the one line in its body."""

    configure_optimizers = optimize_with(NAMOD, schedule=SCHEDULE, **HYPER)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 refuses the CPU unless told that it is the device; all else is Lightning's."""

    def _setup_model(self, model: nn.Module) -> FSDP:
        self.kwargs.setdefault("use_orig_params", True)
        return FSDP(module=model, device_id=torch.device("cpu"), **self.kwargs)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")


def _fsdp2(module: Net, mesh: DeviceMesh) -> None:
    for child in module.children():
        fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])


def _tp(module: Net, mesh: DeviceMesh) -> None:
    parallelize_module(module, mesh["tensor_parallel"], {"mid": ColwiseParallel(), "down": RowwiseParallel()})


def _fsdp2_tp(module: Net, mesh: DeviceMesh) -> None:
    _tp(module, mesh)
    _fsdp2(module, mesh)


def _hsdp(module: Net, mesh: DeviceMesh) -> None:
    shards = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for child in module.children():
        fully_shard(child, mesh=shards)
    fully_shard(module, mesh=shards)


STRATEGIES: dict[str, tuple[int, Callable[[], str | Strategy], Any]] = {  # processes, strategy, what shards the module
    "ddp": (2, lambda: "ddp", None),
    "fsdp1": (2, CPUFSDPStrategy, None),
    "fsdp2": (2, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), _fsdp2),
    "tp": (2, lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), _tp),
    "fsdp2+tp": (4, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2), _fsdp2_tp),
    "hsdp": (4, lambda: ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1), _hsdp),
}
OF_DEVICES = [  # tests on four devices are slow
    pytest.param(name, marks=pytest.mark.slow) if devices > 2 else name for name, (devices, *_) in STRATEGIES.items()
]
CLIPPED = ("ddp", "fsdp2")  # where Lightning itself clips by norm


def fit(
    strategy: str | Strategy, devices: int, shares: int, shard: Any, callback: bool, clip: bool
) -> dict[str, Tensor]:
    """Train 6 steps of 2 accumulated batches of 4 samples in all, divided over ``shares`` data-parallel ranks."""
    module = Net(shard) if callback else WithTheLine(shard)
    callbacks: list[pl.Callback] = []
    if callback:
        callbacks.append(OptimizerCallback(functools.partial(NAMOD, **HYPER), schedule=SCHEDULE))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=6,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1 if clip else None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = Regression()
    if shares > 1:  # rank r of the data-parallel ranks takes every shares-th sample of each global batch
        tensor_parallel = devices // shares
        rank = dist.get_rank() // tensor_parallel
        order = [i for start in range(0, 48, 4) for i in range(start, start + 4) if i % shares == rank]
        trainer.fit(module, DataLoader(data, batch_size=4 // shares, sampler=order))
    else:
        trainer.fit(module, DataLoader(data, batch_size=4))
    root = trainer.strategy.model
    if isinstance(root, FSDP):
        with FSDP.summon_full_params(root, writeback=False):
            return {clean(n).removeprefix("_forward_module."): p.detach().clone() for n, p in root.named_parameters()}
    return {name: whole(parameter).clone() for name, parameter in module.named_parameters()}


def fit_cases(rank: int, names: list[str]) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    answers = {}
    for name in names:
        devices, strategy, shard = STRATEGIES[name]
        shares = 1 if name == "tp" else 2 if name == "fsdp2+tp" else devices
        for callback in (False, True):
            for clip in {False, name in CLIPPED}:
                answers[name, callback, clip] = fit(strategy(), devices, shares, shard, callback, clip)
    return answers


@functools.cache
def answers(devices: int) -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(
        fit_cases, devices, [n for n, (count, _, _) in STRATEGIES.items() if count == devices], timeout=280
    )


@functools.cache
def one_device(callback: bool, clip: bool) -> dict[str, Tensor]:
    return fit("auto", 1, 1, None, callback, clip)


CASES = [
    pytest.param(name, callback, clip, marks=[pytest.mark.slow] * (STRATEGIES[name][0] > 2))
    for name in STRATEGIES
    for callback in (False, True)
    for clip in sorted({False, name in CLIPPED})
]


@pytest.mark.parametrize(("strategy", "callback", "clip"), CASES)
def test_a_strategy_trains_as_one_device_does(strategy: str, callback: bool, clip: bool) -> None:
    expected = one_device(callback, clip)
    tolerance = 1e-6 if strategy == "fsdp1" else 1e-9  # Lightning's FSDP precision makes float32 of the weights
    for answer in answers(STRATEGIES[strategy][0]):
        trained = answer[strategy, callback, clip]
        assert trained.keys() == expected.keys()
        for name, weight in trained.items():
            assert relative_error(weight, expected[name]) <= tolerance, name


def fabric_fsdp2(rank: int, right_order: bool) -> bool:
    def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for child in module:
            fully_shard(child, mesh=mesh["data_parallel"])
        return fully_shard(module, mesh=mesh["data_parallel"])

    os.environ.update(NODE_RANK="0")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricModelParallelStrategy(parallelize_fn=parallelize))
    fabric.launch()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    if right_order:
        model = fabric.setup_module(model)
        optimizer: Any = fabric.setup_optimizers(build_optimizer(model, NAMO, lr=0.05))
    else:
        model, optimizer = fabric.setup(model, build_optimizer(model, NAMO, lr=0.05))
    before = [whole(p).clone() for p in model.parameters()]
    fabric.backward(model(torch.ones(2, 6)).square().sum())
    optimizer.step()
    return all(not torch.equal(b, whole(p)) for b, p in zip(before, model.parameters(), strict=True))


def test_fabric_with_fsdp2_trains_in_the_order_that_the_documentation_gives() -> None:
    assert run_ranks(fabric_fsdp2, 2, True, timeout=90) == [True, True]


def test_the_fabric_order_that_trains_nothing_is_refused() -> None:
    with pytest.raises(WorkerError, match=r"training would change nothing.*then build the optimizer"):
        run_ranks(fabric_fsdp2, 2, False, timeout=90)
