"""The exchange with one process, which sends nothing; tests/distributed has several."""

from __future__ import annotations

import torch

from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.exchange import Exchange
from lightning_namo.sharding.layout import Rectangle
from lightning_namo.sharding.publication import Published
from lightning_namo.workspace import Workspace

SHAPES = [(2, 3), (4, 2), (2, 3)]


def test_one_process_works_on_the_active_matrices_in_stacks_of_a_shape() -> None:
    matrices = [Matrix(f"w{i}", (m, n), torch.float32, m * n, Rectangle(0, m, 0, n)) for i, (m, n) in enumerate(SHAPES)]
    exchange = Exchange(matrices, torch.device("cpu"), None, Published, Workspace())
    stacked = []

    def work(stacks: list[tuple[tuple[int, ...], torch.Tensor]]) -> list[torch.Tensor]:
        stacked.extend(indices for indices, _ in stacks)
        return [10 * tensor for _, tensor in stacks]

    def shards(indices: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([torch.full(SHAPES[index], float(index)) for index in indices])

    results = {
        index: flat
        for stacks in exchange.map([0, 2], shards, work)
        for i, f in stacks
        for index, flat in zip(i, f, strict=True)
    }
    assert stacked == [(0, 2)]
    assert {index: flat.tolist() for index, flat in results.items()} == {0: [0.0] * 6, 2: [20.0] * 6}
    assert exchange.bytes_sent == 0
    assert exchange.is_current
    assert all(exchange.is_primary_replica(index) for index in range(3))
