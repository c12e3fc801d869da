"""A GPT-2 over the ranks of a device mesh: FSDP2, HSDP and tensor parallelism, in any combination."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import linear

from lightning_namo.arguments import COUNT, check
from lightning_namo.gpt2.model import GPT2, Block


class MeshStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy whose data-parallel size follows the number of processes.

    Lightning's "auto" is the number of nodes, and of devices per node for tensor parallelism.

    Args:
        data_parallel_size: Groups of ranks that read different batches; "auto": the processes divided by
            `tensor_parallel_size`.
        tensor_parallel_size: Ranks that share each block.
        save_distributed_checkpoint: Whether a checkpoint is a folder with a file of each rank, in place of one file.
        process_group_backend: Of torch.distributed; None takes the device's.
        timeout: After which a collective that some rank does not join fails.

    Raises:
        ValueError: For a size below 1. By the Trainer, if the two sizes do not multiply to the number of processes.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        for key, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            check(size == "auto" or COUNT.accepts(size), "MeshStrategy", key, COUNT.expected, repr(size))
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )

    def set_world_ranks(self) -> None:
        """Count the processes, which the Trainer does when it is made, and fit the sizes to them."""
        super().set_world_ranks()
        data, tensor = self._data_parallel_size, self._tensor_parallel_size
        assert isinstance(tensor, int)
        if data == "auto":
            data = self._data_parallel_size = max(self.world_size // tensor, 1)
        if data * tensor != self.world_size:
            raise ValueError(
                f"Expected data_parallel_size * tensor_parallel_size = {data} * {tensor} to be the number of processes "
                f"(devices * num_nodes). Got {self.world_size} processes."
            )


def shard(model: GPT2, mesh: DeviceMesh, *, replicas: int = 1, bf16: bool = False) -> None:
    """Shard a GPT-2 in place, block by block, its tied embedding in the group of the root.

    Attention heads and the hidden layer of each MLP are divided over the tensor-parallel ranks (Shoeybi et al. 2019,
    arXiv 1909.08053, section 3). Every parameter is then sharded over the data-parallel ranks with FSDP2. Embeddings,
    norms and the output head are not divided by tensor parallelism.

    Args:
        model: Not on the meta device, and the same on all ranks.
        mesh: Lightning's, with dimensions "data_parallel" and "tensor_parallel", over all ranks.
        replicas: Copies of the sharded model (HSDP); each is sharded over data-parallel size / `replicas` ranks.
        bf16: Whether to gather and compute in bfloat16. Gradients are reduced, and weights kept, in their own dtype.

    Raises:
        ValueError: `replicas` does not divide the data-parallel ranks, or the tensor-parallel ranks not the heads.
    """
    data, tensor = _meshes(mesh, replicas)
    if model.config.n_head % tensor.size():
        raise ValueError(
            f"Expected n_head to be a multiple of tensor_parallel_size = {tensor.size()}. Got {model.config.n_head}."
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.transformer["h"].children():
        assert isinstance(block, Block)
        if tensor.size() > 1:
            _divide(block, tensor)
        fully_shard(block, mesh=data, mp_policy=policy)
    fully_shard(model, mesh=data, mp_policy=policy)


def _meshes(mesh: DeviceMesh, replicas: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The data-parallel mesh, replicas x shards if there are replicas, and the tensor-parallel mesh of this rank."""
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if data.size() % replicas:
        raise ValueError(f"Expected replicas to divide the {data.size()} data-parallel ranks. Got {replicas}.")
    if replicas == 1:
        return data, tensor
    sizes = (replicas, data.size() // replicas, tensor.size())
    grid = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=("replicate", "shard", "tensor_parallel"))
    return grid["replicate", "shard"], grid["tensor_parallel"]


def _divide(block: Block, mesh: DeviceMesh) -> None:
    """Divide a block over tensor-parallel ranks: its heads, and the hidden layer of its MLP."""
    block.attn.c_attn = _OwnHeads(block.attn.c_attn, mesh)
    plan = {"attn.c_proj": RowwiseParallel(), "mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
    parallelize_module(block, mesh, plan)


class _OwnHeads(nn.Linear):
    """A fused q/k/v projection that computes the queries, keys and values of this rank's heads.

    A rank's rows of the fused matrix are not those of its heads: of two ranks, the first has all queries and half of
    the keys. The matrix stays so, in contiguous rows, for checkpoints and the optimizer. It is gathered for a forward
    pass: 3 C^2 numbers, where activations, 3 B T C, would be several times as many.

    Args:
        fused: The projection, `(3C, C)` with rows q, k, v.
        mesh: The tensor-parallel ranks.
    """

    def __init__(self, fused: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__(fused.in_features, fused.out_features, bias=fused.bias is not None, device="meta")
        self.mesh = mesh
        for name, parameter in fused.named_parameters():
            setattr(self, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)`, the same on all ranks, to q, k and v of this rank's heads, `(B, T, 3C / ranks)`."""
        # Each rank's gradient of x is that of its heads only: they are to be summed.
        x = DTensor.from_local(x, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        return linear(x, self._own(self.weight), None if self.bias is None else self._own(self.bias))

    def _own(self, parameter: Tensor) -> Tensor:
        """The rows of this rank's heads, in the order q, k, v."""
        assert isinstance(parameter, DTensor)
        whole: Tensor = parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        parts = whole.view(3, self.mesh.size(), -1, *whole.shape[1:])  # q, k and v, each in the ranks' heads
        return parts[:, self.mesh.get_local_rank()].flatten(0, 1)
