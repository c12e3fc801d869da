"""Lightning's strategies on the CPU, and a network and data to train under each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import Dataset

from lightning_namo.testing.layouts import shard_children

EXACT_HYPER: dict[str, Any] = {"lr": 0.02, "orthogonalizer": "svd", "adamw_lr": 0.005}


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


class RegressionNet(pl.LightningModule):
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


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 refuses the CPU unless told that it is the device; all else is Lightning's."""

    def _setup_model(self, model: nn.Module) -> FSDP:
        self.kwargs.setdefault("use_orig_params", True)
        return FSDP(module=model, device_id=torch.device("cpu"), **self.kwargs)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")


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


def model_parallel(data: int, tensor: int, sharded: bool = True) -> Strategy:
    return ModelParallelStrategy(
        data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=sharded
    )


def fsdp2(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return shard_children(module, mesh["data_parallel"])


def tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(module, mesh["tensor_parallel"], {"mid": ColwiseParallel(), "down": RowwiseParallel()})


def _fsdp2_tp(module: nn.Module, mesh: DeviceMesh) -> None:
    tensor_parallel(module, mesh)
    fsdp2(module, mesh)


def _hsdp(module: nn.Module, mesh: DeviceMesh) -> None:
    shard_children(module, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


STRATEGIES: dict[str, tuple[int, Callable[[], str | Strategy], Any]] = {  # processes, strategy, what shards the module
    "ddp": (2, lambda: "ddp", None),
    "fsdp1": (2, CPUFSDPStrategy, None),
    "fsdp2": (2, lambda: model_parallel(2, 1), fsdp2),
    "tp": (2, lambda: model_parallel(1, 2), tensor_parallel),
    "fsdp2+tp": (4, lambda: model_parallel(2, 2), _fsdp2_tp),
    "hsdp": (4, lambda: model_parallel(4, 1), _hsdp),
}
