"""The exchange with one process, which sends nothing; tests/distributed has several."""

from __future__ import annotations

from collections import deque

import torch

from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.exchange import Exchange
from lightning_namo.sharding.layout import Rectangle
from lightning_namo.sharding.publication import Published
from lightning_namo.workspace import Workspace

SHAPES = [(2, 3), (4, 2), (2, 3)]


def test_one_process_works_on_the_buckets_of_a_queue_in_stacks_of_a_shape() -> None:
    matrices = [Matrix(f"w{i}", (m, n), torch.float32, m * n, Rectangle(0, m, 0, n)) for i, (m, n) in enumerate(SHAPES)]
    exchange = Exchange(matrices, torch.device("cpu"), None, Published, Workspace())
    stacked = []

    def work(number: int, stacks: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {place: 10 * tensor for place, tensor in stacks.items()}

    def shards(number: int) -> dict[int, torch.Tensor]:
        members = [stack.indices for stack in exchange.buckets[number]]
        stacked.extend(members)
        return {
            place: torch.stack([torch.full(SHAPES[index], float(index)) for index in indices])
            for place, indices in enumerate(members)
        }

    queue = deque([0, 1])
    results = {}
    for number, by_place in exchange.map(queue, shards, work):
        results[number] = {place: result.tolist() for place, result in by_place.items()}
        if number == 0 and len(stacked) < 3:
            queue.append(0)  # once more
    assert [set(indices) for indices in stacked] == [{1}, {0, 2}, {1}]
    assert results == {0: {0: [[10.0] * 8]}, 1: {0: [[0.0] * 6, [20.0] * 6]}}
    assert exchange.bytes_sent == 0
    assert exchange.is_current
    assert all(exchange.is_primary_replica(index) for index in range(3))
