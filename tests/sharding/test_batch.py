"""Where the shards of batched matrices are: parts that each rank holds alike, and numbers that are spread over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_namo.sharding.batch import BatchLayout, Box, divide, layout_of
from lightning_namo.sharding.layout import FlatRange, Layout, Rectangle

SHAPE = (5, 4, 3)
WAYS: dict[str, list[Any]] = {
    "whole": [Rectangle(0, 5, 0, 12)],
    "copies": [Rectangle(0, 5, 0, 12)] * 3,
    "experts": [Rectangle(0, 2, 0, 12), Rectangle(2, 4, 0, 12), Rectangle(4, 5, 0, 12), Rectangle(0, 0, 0, 0)],
    "rows of each": [Rectangle(0, 5, 0, 3), Rectangle(0, 5, 3, 12)],
    "columns of each": [Box(SHAPE, (0, 0, 0), (5, 4, 2)), Box(SHAPE, (0, 0, 2), (5, 4, 1))],
    "columns of some": [
        Box(SHAPE, (0, 0, 0), (3, 4, 2)),
        Box(SHAPE, (0, 0, 2), (3, 4, 1)),
        Box(SHAPE, (3, 0, 0), (2, 4, 2)),
        Box(SHAPE, (3, 0, 2), (2, 4, 1)),
    ],
    "runs": [FlatRange(0, 17, 12), FlatRange(17, 19, 12), FlatRange(19, 19, 12), FlatRange(19, 60, 12)],
}


def layouts(way: str, **keys: Any) -> list[BatchLayout]:
    keys = {"batched": True, "transposed": False, "blocks": 1, "name": "w"} | keys
    return [BatchLayout.of(SHAPE, region, **keys) for region in WAYS[way]]


def shards(way: str, full: Tensor) -> list[Tensor]:
    found = []
    for region in WAYS[way]:
        part = region.of(full.reshape(5, 12)).clone()
        found.append(part.flatten() if isinstance(region, FlatRange) else part)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_parts_make_up_the_batch_and_every_rank_holds_one_region_of_each(way: str) -> None:
    full, of_ranks = torch.arange(60.0).view(SHAPE), layouts(way)
    bounds = divide(of_ranks)
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == 5
    if way == "copies":
        assert len(bounds) == 3, "every rank may own some"
    for first, last in bounds:
        together = torch.full((last - first, 4, 3), torch.nan)
        for layout, shard in zip(of_ranks, shards(way, full), strict=True):
            part = layout.part(first, last)
            assert part.layout.matrix_shapes == ((4, 3),)
            local = part.local(shard)
            assert local.shape[0] == last - first
            assert local.numel() == (last - first) * part.layout.region.numel
            into = part.layout.region.of(together)
            into.copy_(local.view(into.shape))
            local.zero_()  # a view
            assert local.numel() == 0 or (shard == 0).any()
        assert torch.equal(together, full[first:last])


@pytest.mark.parametrize("kind", ["matrix", "column", "row"])
@pytest.mark.parametrize("keys", [{}, {"transposed": True}, {"blocks": 2}, {"blocks": [1, 3]}])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_come_back_from_shards(way: str, keys: dict[str, Any], kind: Any) -> None:
    if keys.get("transposed") and "blocks" in keys:
        return
    of_ranks = layouts(way, **keys)
    numbers = torch.rand(of_ranks[0].statistic_shape(kind)) + 0.5
    gathered = torch.zeros_like(numbers)
    for layout, shard in zip(of_ranks, shards(way, torch.zeros(SHAPE)), strict=True):
        spread = layout.spread_state(numbers, kind, shard.shape)
        assert spread.shape == shard.shape
        gathered = torch.maximum(gathered, layout.collect_state(spread, kind))
    assert torch.equal(gathered, numbers)


def test_matrices_that_stay_whole_on_a_rank_are_one_part() -> None:
    assert divide(layouts("experts")) == [(0, 2), (2, 4), (4, 5)]


def test_a_number_divides_the_first_dimension() -> None:
    layout = BatchLayout.of((6, 3, 2), Rectangle(0, 6, 0, 6), batched=3, transposed=True, blocks=1, name="conv")
    assert (layout.count, layout.matrix.matrix_shapes) == (3, ((6, 2),))
    assert layout.statistic_shape("column") == (3, 2)


@pytest.mark.parametrize(
    ("shape", "region", "batched", "words"),
    [
        ((4, 3), Rectangle(0, 4, 0, 3), True, "has too few dimensions"),
        ((7, 3, 2), Rectangle(0, 7, 0, 6), 3, "does not divide into so many"),
        ((5, 4, 3), Rectangle(0, 5, 1, 7), True, "to be sharded by matrices, rows or columns"),
        ((6, 4, 3), Box((6, 4, 3), (0, 0, 0), (6, 4, 1)), 2, "to be sharded by matrices, rows or columns"),
        ((5, 4, 3), Box((5, 4, 3), (0, 0, 0), (5, 4, 1)), False, "sharded over dimension 0 or 1"),
    ],
)
def test_what_gives_no_rectangles_of_matrices_is_refused_by_name(
    shape: tuple[int, ...], region: Any, batched: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=f"w .*{words}"):
        layout_of(shape, region, batched=batched, transposed=False, blocks=1, name="w")


def test_one_matrix_has_the_layout_of_a_matrix() -> None:
    assert isinstance(
        layout_of((4, 3), Rectangle(0, 4, 0, 3), batched=False, transposed=False, blocks=1, name="w"), Layout
    )
