"""The plan of the exchange: owners, senders and buckets, without processes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_namo.polar.cost import newton_schulz_flops
from lightning_namo.sharding.assignment import Matrix, assign, assign_owners
from lightning_namo.sharding.layout import FlatRange, Rectangle, ShardRegion

GPT2 = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280)}


def gpt2_shapes(size: str) -> list[tuple[int, int]]:
    layers, width = GPT2[size]
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers


def gpt2_costs(size: str) -> list[int]:
    return [newton_schulz_flops(shape, 5) for shape in gpt2_shapes(size)]


def busiest(costs: list[int], owners: tuple[int, ...]) -> int:
    loads = [0] * (max(owners) + 1)
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return max(loads)


def fits(costs: list[int], world_size: int, capacity: float) -> bool:
    """Whether any assignment of whole matrices keeps all ranks below a load: exact, by filling rank after rank."""
    sizes = sorted(set(costs))
    counts = np.array([costs.count(size) for size in sizes])
    some = itertools.product(*(range(min(int(capacity // s), c) + 1) for s, c in zip(sizes, counts, strict=True)))
    loads = [(np.array(filling), float(np.dot(filling, sizes))) for filling in some]
    full = [f for f, load in loads if load <= capacity and ((load + np.array(sizes) > capacity) | (f == counts)).all()]
    done = np.zeros(counts + 1, dtype=bool)
    new = np.zeros((1, len(sizes)), dtype=int)
    for _ in range(world_size):
        before = done.copy()
        for filling in full:
            done[tuple(np.minimum(new + filling, counts).T)] = True
        new = np.argwhere(done & ~before)  # what was there has been gone on from
    return bool(done[tuple(counts)])


@pytest.mark.slow
@pytest.mark.parametrize("size", GPT2)
def test_busiest_rank_is_within_5_percent_of_the_best_that_whole_matrices_allow(size: str) -> None:
    costs = gpt2_costs(size)
    for world_size in range(2, 65):
        load = busiest(costs, assign_owners(costs, world_size))
        even = max(sum(costs) / world_size, max(costs))
        assert fits(costs, world_size, load)
        # Where whole matrices do not divide evenly, the proof that no assignment comes 5% below this one.
        assert load <= 1.05 * even or not fits(costs, world_size, load / 1.05), world_size


@pytest.mark.parametrize("size", GPT2)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_one_node_is_within_5_percent_of_an_even_share(size: str, world_size: int) -> None:
    costs = gpt2_costs(size)
    assert busiest(costs, assign_owners(costs, world_size)) <= 1.05 * max(sum(costs) / world_size, max(costs))


def test_llama_on_six_nodes_is_within_a_percent_of_an_even_share() -> None:
    # Without the bisection (longest first and swaps alone) the busiest rank has 5.6% more than that.
    shapes = [(4096, 4096)] * 4 + [(11008, 4096), (4096, 11008), (11008, 4096)]
    costs = [newton_schulz_flops(shape, 5) for shape in shapes] * 32
    assert busiest(costs, assign_owners(costs, 48)) <= 1.01 * sum(costs) / 48


def test_more_ranks_than_matrices_leave_ranks_idle() -> None:
    assert sorted(assign_owners([5, 5, 5], 7)) == [0, 1, 2]


def published(by_rank: list[list[ShardRegion]], shapes: list[tuple[int, int]], name: str = "w") -> list[list[Matrix]]:
    return [
        [
            Matrix(f"{name}{i}", s, torch.bfloat16, s[0] * s[1], r)
            for i, (s, r) in enumerate(zip(shapes, regions, strict=True))
        ]
        for regions in by_rank
    ]


def test_replicas_send_a_region_once_and_an_owner_sends_itself_nothing() -> None:
    top, bottom = Rectangle(0, 2, 0, 4), Rectangle(2, 4, 0, 4)
    plan = assign(published([[top], [bottom], [top], [bottom]], [(4, 4)]), 1000)  # HSDP 2 x 2
    owner = plan.owners[0]
    assert set(plan.senders[0]) == {top, bottom}
    held = top if owner in (0, 2) else bottom
    assert plan.senders[0][held] == owner


def test_ranks_own_what_they_hold_where_the_loads_allow() -> None:
    whole, nothing = FlatRange(0, 16, 4), FlatRange(0, 0, 4)
    plan = assign(
        published([[nothing, nothing, whole], [whole, nothing, nothing], [nothing, whole, nothing]], [(4, 4)] * 3), 1000
    )
    assert plan.owners == (1, 2, 0)


def test_buckets_bound_what_a_rank_assembles_and_hold_every_matrix_once() -> None:
    shapes = [(4, 4), (8, 4), (4, 4), (16, 16), (2, 4)]
    whole = [[Rectangle(0, m, 0, n) for m, n in shapes]] * 2
    plan = assign(published(whole, shapes), 100)
    assert sorted(i for bucket in plan.buckets for i in bucket) == list(range(len(shapes)))
    for bucket in plan.buckets:
        for rank in range(2):
            owned = [shapes[i][0] * shapes[i][1] * 2 for i in bucket if plan.owners[i] == rank]
            assert sum(owned) <= 100 or len(owned) == 1


@pytest.mark.parametrize("size", GPT2)
@pytest.mark.parametrize("mib", [8, 32])
def test_ranks_that_wait_for_each_other_at_every_bucket_lose_little(size: str, mib: int) -> None:
    shapes, costs = gpt2_shapes(size), gpt2_costs(size)
    regions = [Rectangle(0, rows, 0, cols) for rows, cols in shapes]
    matrices = [
        Matrix(f"w{i}", shape, torch.bfloat16, cost, region)
        for i, (shape, cost, region) in enumerate(zip(shapes, costs, regions, strict=True))
    ]
    lost = []
    for world_size in range(2, 65):
        plan = assign([matrices] * world_size, mib * 2**20)
        of_ranks = range(world_size)
        work = [[sum(costs[i] for i in b if plan.owners[i] == rank) for rank in of_ranks] for b in plan.buckets]
        lost.append(sum(max(loads) for loads in work) / busiest(costs, plan.owners))
        assert len(plan.buckets) >= min(3, len(costs) // world_size)  # else nothing would overlap
    assert max(lost) <= 1.18
    assert sum(lost) / len(lost) <= 1.06


@pytest.mark.parametrize(
    "regions",
    [
        [Rectangle(0, 2, 0, 4), Rectangle(3, 4, 0, 4)],  # a row missing
        [Rectangle(0, 2, 0, 4), Rectangle(1, 4, 0, 4)],  # a row twice
        [Rectangle(0, 4, 0, 2), Rectangle(0, 4, 2, 3)],  # a column missing
        [FlatRange(0, 7, 4), FlatRange(8, 16, 4)],  # an element missing
    ],
)
def test_shards_that_do_not_make_up_a_matrix_are_refused(regions: list[ShardRegion]) -> None:
    with pytest.raises(ValueError, match=r"Expected the shards of w0 \(4, 4\) to make up the whole matrix"):
        assign(published([[region] for region in regions], [(4, 4)]), 1000)


def test_ranks_that_disagree_are_named_with_what_differs() -> None:
    whole = Rectangle(0, 4, 0, 4)
    ours, theirs = published([[whole]], [(4, 4)])[0], published([[whole]], [(4, 4)], name="other")[0]
    with pytest.raises(ValueError, match=r"rank 0 has w0 \(4, 4\) torch.bfloat16 where rank 1 has other0"):
        assign([ours, theirs], 1000)
