"""Sharding a GPT-2, on one rank of a world of two; tests/distributed trains it."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh

from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.parallel import MeshStrategy, shard
from lightning_namo.sharding.local import local_tensor

pytestmark = pytest.mark.usefixtures("fake_world")


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["data", "tensor"])
def test_each_rank_has_half_of_the_rows_of_a_fused_projection(sizes: tuple[int, int]) -> None:
    network = GPT2(GPT2Config(64, 8, 1, 2, 8))
    shard(network, init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel")))
    assert local_tensor(network.transformer["h"][0].attn.c_attn.weight).shape == (12, 8)
    assert network.lm_head.weight is network.transformer["wte"].weight


@pytest.mark.parametrize(
    ("sizes", "replicas", "message"),
    [
        ((1, 2), 1, "Expected n_head to be a multiple of tensor_parallel_size = 2. Got 1"),
        ((2, 1), 3, "Expected replicas to divide the 2 data-parallel ranks. Got 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int], replicas: int, message: str) -> None:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(ValueError, match=message):
        shard(GPT2(GPT2Config(64, 8, 1, 1, 8)), mesh, replicas=replicas)


def test_the_data_parallel_size_is_what_tensor_parallelism_leaves_of_the_processes() -> None:
    def made_for(processes: int) -> MeshStrategy:
        strategy = MeshStrategy(tensor_parallel_size=2)
        strategy.parallel_devices = [torch.device("cpu")] * processes
        strategy.cluster_environment = LightningEnvironment()
        strategy.set_world_ranks()
        return strategy

    assert made_for(6)._data_parallel_size == 3
    with pytest.raises(ValueError, match=r"data_parallel_size \* tensor_parallel_size = 2 \* 2 .* Got 5 processes"):
        made_for(5)
