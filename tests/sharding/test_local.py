"""Local shards: stacks of them, and sums of their squares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_namo.sharding.local import local_gradient, stack, sum_of_squares, unstack
from lightning_namo.workspace import Workspace


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_done_to_a_stack_is_done_to_its_tensors(count: int) -> None:
    tensors = [torch.full((2, 3), float(number)) for number in range(count)]
    with (workspace := Workspace()).frame():
        stacked = stack(tensors, workspace)
        assert stacked.shape == (count, 2, 3)
        unstack(stacked.add_(1), tensors)
    assert [tensor[0, 0].item() for tensor in tensors] == [number + 1 for number in range(count)]


def test_a_sparse_gradient_is_refused_and_a_missing_one_is_none() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    assert local_gradient("table", parameter) is None
    parameter.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match=r"table has a torch.sparse_coo one. Use sparse=False"):
        local_gradient("table", parameter)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3000), (2, 40, 30), (2, 3, 20000), (2, 3, 4, 5), (2, 0)])
def test_sums_of_squares_are_those_of_float64(shape: tuple[int, ...]) -> None:
    tensors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = tensors.double().square().flatten(1).sum(dim=1)
    torch.testing.assert_close(sum_of_squares(tensors, torch.float32).double(), expected, rtol=4e-6, atol=0)
