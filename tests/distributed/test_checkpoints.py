"""A run goes on from its checkpoint as if it had not stopped: from every strategy, in every strategy that reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    OptimStateKeyType,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, WarmupStableDecay, optimize_with
from tests.distributed.test_strategies import CPUFSDPStrategy
from tests.helpers.launch import run_ranks
from tests.helpers.worker import clean, relative_error, whole

pytestmark = pytest.mark.timeout(900)  # the first test waits for all the runs
STEPS, SAVED_AT, BATCH = 5, 3, 6
OPTIMIZERS: dict[str, type] = {"NAMO": NAMO, "NAMOD": NAMOD, "Muon": Muon, "AdaMuon": AdaMuon}
ADOPTER = NAMOD  # goes on where AdamW stopped


class Net(pl.LightningModule):
    """Matrices and AdamW's parameters take turns, one is frozen, and one is of a single row: an empty shard."""

    def __init__(self, optimizer: str, shard: Callable[[nn.Module, DeviceMesh], None] | None, share: tuple[int, int]):
        super().__init__()
        self.optimizer, self.shard, self.share = optimizer, shard, share
        self.up: nn.Linear | None = None
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS, BATCH, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randn(STEPS, BATCH, 3, generator=generator, dtype=torch.float64)

    def configure_model(self) -> None:
        if self.up is None:
            torch.manual_seed(0)
            self.up, self.norm = nn.Linear(6, 12).double(), nn.LayerNorm(12).double()
            self.frozen = nn.Linear(12, 12, bias=False).double().requires_grad_(False)
            self.mid, self.down = nn.Linear(12, 10).double(), nn.Linear(10, 3).double()
            self.gate = nn.Linear(12, 1, bias=False).double()
            if self.shard is not None:
                self.shard(self, self.device_mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        part, parts = self.share
        dtype = self.up.weight.dtype  # float32 under FSDP1: Lightning's precision plugin makes it so
        x, y = (data[self.trainer.global_step][part::parts].to(dtype) for data in (self.x, self.y))
        hidden = self.frozen(self.norm(torch.tanh(self.up(x))))
        return nn.functional.mse_loss(self.down(torch.tanh(self.mid(hidden))) * torch.sigmoid(self.gate(hidden)), y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(STEPS))

    def configure_optimizers(self) -> Any:
        schedule = WarmupStableDecay(warmup=2, decay=2, total_steps=STEPS)
        if self.optimizer == "AdamW":
            return optimize_with(torch.optim.AdamW, schedule=schedule, lr=0.005)(self)
        hyper: dict[str, Any] = {"lr": 0.02, "orthogonalizer": "svd", "adamw_lr": 0.005}
        adopt_state = self.optimizer == "adopter"
        cls = ADOPTER if adopt_state else OPTIMIZERS[self.optimizer]
        return optimize_with(cls, schedule=schedule, adopt_state=adopt_state, **hyper)(self)


class FullFSDPStrategy(CPUFSDPStrategy):
    """As Lightning's, but without offloading: on the CPU `.cpu()` copies nothing, and FSDP1 reuses the tensor."""

    def _full(self) -> Any:
        return FSDP.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(rank0_only=True, offload_to_cpu=False),
            FullOptimStateDictConfig(rank0_only=True, offload_to_cpu=False),
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self._full():
            return {name: value.clone() for name, value in self.model.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        with self._full():
            state = FSDP.optim_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer))
        return FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model) if state else state


def _fsdp2(module: nn.Module, mesh: DeviceMesh) -> None:
    for child in module.children():
        fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])


def _tp(module: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(module, mesh["tensor_parallel"], {"mid": ColwiseParallel(), "down": RowwiseParallel()})


def model_parallel(data: int, tensor: int, sharded: bool) -> Strategy:
    return ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=sharded
    )


# name -> processes, strategy that saves, what shards the module. FSDP1 wraps every layer, so that it cuts every matrix,
# and that of a single row between two columns.
PLACES: dict[str, tuple[int, Callable[[], str | Strategy], Any]] = {
    "single": (1, lambda: "auto", None),
    "ddp 2": (2, lambda: "ddp", None),
    "fsdp1 2": (2, lambda: FullFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="full"), None),
    "fsdp1 2 sharded": (2, lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"), None),
    "fsdp2 2": (2, lambda: model_parallel(2, 1, False), _fsdp2),
    "fsdp2 2 sharded": (2, lambda: model_parallel(2, 1, True), _fsdp2),
    "fsdp2 1": (1, lambda: model_parallel(1, 1, False), _fsdp2),
    "fsdp2 1 sharded": (1, lambda: model_parallel(1, 1, True), _fsdp2),
    "fsdp2 3": (3, lambda: model_parallel(3, 1, False), _fsdp2),
    "fsdp2 3 sharded": (3, lambda: model_parallel(3, 1, True), _fsdp2),
    "tp 2": (2, lambda: model_parallel(1, 2, False), _tp),
    "tp 2 sharded": (2, lambda: model_parallel(1, 2, True), _tp),
    "single bf16": (1, lambda: "auto", None),
    "fsdp1 2 bf16": (2, lambda: FullFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="full"), None),
    "fsdp1 2 bf16 sharded": (2, lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"), None),
    "fsdp2 2 bf16": (2, lambda: model_parallel(2, 1, False), _fsdp2),
    "fsdp2 2 bf16 sharded": (2, lambda: model_parallel(2, 1, True), _fsdp2),
}


def fit(place: str, optimizer: str, folder: str, resume: str | None = None) -> dict[str, Tensor]:
    """Train to the last step, saving on the way, or from a checkpoint on; the whole weights."""
    devices, strategy, shard = PLACES[place]
    share = (0, 1) if devices == 1 or place.startswith("tp") else (dist.get_rank(), devices)
    module = Net(optimizer, shard, share)
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename=f"{place}-{optimizer}-{{step}}", every_n_train_steps=SAVED_AT, save_top_k=-1
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy(),
        max_steps=STEPS,
        precision="bf16-true" if "bf16" in place else None,
        callbacks=[] if resume else [saver],
        enable_checkpointing=not resume,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=resume)
    assert trainer.global_step == STEPS
    for state in trainer.optimizers[0].state.values():
        assert all(state[key].dtype in (torch.float32, torch.float64) for key in ("step", "v") if key in state)
    root = trainer.strategy.model
    if isinstance(root, FSDP):
        with FSDP.summon_full_params(root, writeback=False):
            return {clean(n).removeprefix("_forward_module."): p.detach().clone() for n, p in root.named_parameters()}
    return {name: whole(parameter).clone() for name, parameter in module.named_parameters()}


def checkpoint(place: str, optimizer: str, folder: str) -> str:
    return str(Path(folder, f"{place}-{optimizer}-step={SAVED_AT}.ckpt"))


def run_cases(rank: int, cases: list[tuple[str, str, str | None]], folder: str) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    answers = {}
    for to, optimizer, source in cases:
        resume = (
            None if source is None else checkpoint(source, "AdamW" if optimizer == "adopter" else optimizer, folder)
        )
        answers[to, optimizer, source] = fit(to, optimizer, folder, resume)
    return answers


def readable(source: str, to: str) -> bool:
    """What Lightning's strategies read: full checkpoints all of them, sharded ones those of their own kind."""
    kind = {"fsdp1": "fsdp1", "fsdp2": "model parallel", "tp": "model parallel"}
    return "sharded" not in source or kind[source.split()[0]] == kind.get(to.split()[0])


PLAIN = [place for place in PLACES if "bf16" not in place]
RESUMING = [place for place in PLAIN if "sharded" not in place]
EVERYWHERE = ("NAMOD", "AdaMuon")  # v by column, v by element; the others in a part of the table
CASES = [
    (source, to, optimizer)
    for to in RESUMING
    for source in PLAIN
    for optimizer in OPTIMIZERS
    if readable(source, to) and (optimizer in EVERYWHERE or to in ("single", "fsdp1 2", "fsdp2 2"))
]
CASES += [(place, place.removesuffix(" sharded"), o) for place in PLACES if "bf16" in place for o in OPTIMIZERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


def run_all(cases: list[tuple[str, str, str | None]], folder: str) -> dict[Any, dict[str, Tensor]]:
    """Run each case once, those of a number of processes in one launch."""
    answers: dict[Any, dict[str, Tensor]] = {}
    for world in sorted({PLACES[to][0] for to, _, _ in cases}):
        of_world = [case for case in dict.fromkeys(cases) if PLACES[case[0]][0] == world]
        answers |= run_ranks(run_cases, world, of_world, folder, timeout=400)[0]
    return answers


@pytest.fixture(scope="module")
def cases(selected: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(source, to, optimizer) of all tests that are to be run."""
    adopting = [("single", to, "adopter") for case in selected if "source" not in case for to in ("single", case["to"])]
    return [(case["source"], case["to"], case["optimizer"]) for case in selected if "source" in case] + adopting


@pytest.fixture(scope="module")
def uninterrupted(cases: list[tuple[str, str, str]], folder: str) -> dict[Any, dict[str, Tensor]]:
    """Runs without a stop; their checkpoints are left in the folder."""
    return run_all([(source, "AdamW" if o == "adopter" else o, None) for source, _, o in cases], folder)


@pytest.fixture(scope="module")
def resumed(
    cases: list[tuple[str, str, str]], folder: str, uninterrupted: dict[Any, dict[str, Tensor]]
) -> dict[Any, dict[str, Tensor]]:
    return run_all([(to, o, source) for source, to, o in cases], folder)


def few(source: str, to: str, optimizer: str) -> bool:
    """What is not slow: full and sharded checkpoints, of one process and of two."""
    return optimizer == "NAMOD" and source in ("single", "fsdp1 2", "fsdp2 2 sharded") and to in ("single", "fsdp2 2")


@pytest.mark.parametrize(
    ("source", "to", "optimizer"), [pytest.param(*case, marks=[] if few(*case) else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    source: str, to: str, optimizer: str, uninterrupted: dict[Any, Any], resumed: dict[Any, Any]
) -> None:
    expected, actual = uninterrupted[source, optimizer, None], resumed[to, optimizer, source]
    same_world = source.removesuffix(" sharded") == to
    tolerance = 0 if same_world else 1e-5 if "fsdp1" in source + to else 1e-12  # FSDP1 trains in float32
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert relative_error(weight, expected[name]) <= tolerance, name


@pytest.mark.parametrize("to", [pytest.param(to, marks=[] if to == "fsdp2 2" else pytest.mark.slow) for to in RESUMING])
def test_a_run_of_adamw_goes_on_with_namo_d_as_on_one_device(to: str, resumed: dict[Any, Any]) -> None:
    expected, actual = resumed["single", "adopter", "single"], resumed[to, "adopter", "single"]
    for name, weight in actual.items():
        assert relative_error(weight, expected[name]) <= (1e-5 if "fsdp1" in to else 1e-12), name
