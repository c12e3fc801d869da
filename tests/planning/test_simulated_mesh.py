"""Ranks as a grid: what each holds of a parameter."""

from __future__ import annotations

import pytest
import torch

from lightning_namo.planning.simulated_mesh import chunk


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 19, 23])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_chunks_are_those_of_torch_chunk(length: int, parts: int) -> None:
    expected = [part.tolist() for part in torch.arange(length).chunk(parts)] if length else []
    expected += [[]] * (parts - len(expected))
    assert [list(range(*chunk(length, parts, place))) for place in range(parts)] == expected
