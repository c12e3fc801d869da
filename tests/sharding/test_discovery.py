"""Regions of plain parameters and of DTensors, read on one rank of a world of two."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_namo import NAMO
from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.discovery import find_regions, holds_fsdp1, is_fsdp2, part_of, region_of, shard_counts
from lightning_namo.sharding.layout import Rectangle
from lightning_namo.testing.layouts import shard_children


def test_plain_parameters_are_whole() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 2), nn.LayerNorm(5))
    shapes = [(tuple(shape), region.numel) for shape, region in find_regions(module).values()]
    assert shapes == [((5, 3, 2, 2), 60), ((5,), 5), ((5,), 5), ((5,), 5)]
    assert not holds_fsdp1(module)
    assert not is_fsdp2(module)
    assert part_of(module[0].weight, None) == "whole"
    assert part_of(nn.Parameter(torch.empty(0)), None) is None


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize(
    ("placement", "region", "ranks"),
    [
        (Shard(0), Rectangle(0, 3, 0, 12), 2),
        (Shard(1), Rectangle(0, 5, 0, 8), 2),
        (Replicate(), Rectangle(0, 5, 0, 12), 1),
    ],
)
def test_a_dtensor_tells_its_region(placement: Shard | Replicate, region: Rectangle, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(5, 3, 2, 2), mesh, [placement], src_data_rank=None))
    assert region_of(parameter) == ((5, 3, 2, 2), region)
    assert shard_counts(nn.Module(), [parameter]) == [ranks]


@pytest.mark.usefixtures("fake_world")
def test_a_placement_that_is_no_rectangle_is_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 2, 2), mesh, [Shard(2)], src_data_rank=None))
    shape, region = region_of(parameter, "kernel")
    assert (shape, region) == ((4, 2, 2), Box((4, 2, 2), (0, 0, 0), (4, 2, 1)))
    with pytest.raises(ValueError, match=r"0 \(4, 2, 2\) to be replicated or sharded over dimension 0 or 1"):
        NAMO([parameter])
    NAMO([{"params": [parameter], "batched": True}])  # a rectangle of each of four matrices
    partial = DTensor.from_local(torch.ones(4, 2), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"Expected kernel \(4, 2\) to be replicated or sharded, but"):
        region_of(partial, "kernel")


@pytest.mark.usefixtures("fake_world")
def test_units_of_fsdp2_have_the_first_rows_here() -> None:
    module = shard_children(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)), init_device_mesh("cpu", (2,)))
    assert is_fsdp2(module)
    assert [region for _, region in find_regions(module).values()][::2] == [
        Rectangle(0, 3, 0, 4),
        Rectangle(0, 1, 0, 6),
    ]
