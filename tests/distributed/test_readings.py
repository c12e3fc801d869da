"""Readings are the same on every rank and under every layout, to what sums of shards in another order round."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, build_optimizer
from lightning_namo.testing.layouts import LAYOUTS, Odd, clean_name, new_module, prescribed_gradients
from tests.helpers.launch import run_ranks

CLASSES = {"NAMO": NAMO, "NAMOD": NAMOD}
Readings = dict[tuple[str, str], Tensor]


def read(name: str, module: nn.Module, kind: type[Odd], batched: bool | None = None) -> Readings:
    optimizer = build_optimizer(module, CLASSES[name], blocks=kind.blocks, orthogonalizer="svd", max_step=0.004)
    optimizer.bucket_bytes, optimizer.batched, optimizer.keeps_readings = 1500, batched, True
    for step in range(3):
        optimizer.zero_grad()
        module(prescribed_gradients(new_module(kind, torch.float64), step)).backward()
        optimizer.step()
    found = optimizer.readings()
    return {(key, clean_name(p)): value.clone() for key, of in found.items() for p, value in of.items()}


def on_rank(rank: int, layout: str) -> Any:
    kind, wrap = LAYOUTS[layout]
    cases = [(name, batched) for name in CLASSES for batched in (None, True)]
    return {case: read(case[0], wrap(new_module(kind, torch.float64)), kind, case[1]) for case in cases}


@cache
def alone(name: str, kind: type[Odd]) -> Readings:
    return read(name, new_module(kind, torch.float64), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_and_layouts_read_the_same(layout: str) -> None:
    first, second = run_ranks(on_rank, 2, layout)
    for (name, batched), found in first.items():
        expected = alone(name, LAYOUTS[layout][0])
        assert found.keys() == second[name, batched].keys() == expected.keys()
        assert {"signal_fraction", "at_cap", "effective_decay"} < {key for key, _ in found}
        for key, value in found.items():
            assert torch.equal(value, second[name, batched][key]), key
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=str(key))
