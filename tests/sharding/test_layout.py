"""Regions of stored matrices, and the true matrices in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_namo.sharding.layout import FlatRange, Layout, Rectangle, ShardRegion, StatisticKind

FULL = torch.arange(48.0).view(2, 6, 4)  # two stored matrices
REGIONS = [
    Rectangle(0, 6, 0, 4),
    Rectangle(2, 5, 1, 3),
    Rectangle(0, 0, 0, 0),
    FlatRange(5, 15, 4),
    FlatRange(8, 9, 4),
    FlatRange(0, 0, 4),
]


@pytest.mark.parametrize("region", REGIONS)
def test_a_rectangle_made_of_a_region_gives_the_region_again(region: ShardRegion) -> None:
    local = region.of(FULL).flatten(1) if isinstance(region, FlatRange) else region.of(FULL)
    assert local[0].numel() == region.numel
    rectangle = region.to_rectangle(local)
    assert rectangle.shape[1:] == (region.row_end - region.row, region.col_end - region.col)
    assert torch.equal(region.from_rectangle(rectangle, local.shape[1:]), local)


def test_a_run_is_padded_with_zeros_to_whole_rows() -> None:
    run = FlatRange(5, 9, 4)
    expected = torch.tensor([[0.0, 5, 6, 7], [8, 0, 0, 0]])
    assert torch.equal(run.to_rectangle(run.of(FULL[:1]))[0], expected)


@pytest.mark.parametrize(("transposed", "blocks"), [(False, 1), (False, 3), (False, [1, 5]), (True, 2), (True, [3, 1])])
def test_matrices_are_stored_as_they_were_taken_out(transposed: bool, blocks: int | list[int]) -> None:
    layout = Layout.of((6, 4), Rectangle(0, 6, 0, 4), transposed=transposed, blocks=blocks, name="w")
    matrices = layout.matrices(FULL)
    assert tuple(tuple(matrix.shape[1:]) for matrix in matrices) == layout.matrix_shapes
    assert torch.equal(layout.store(matrices), FULL)


@pytest.mark.parametrize("kind", ["matrix", "column", "row"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, "unequal"])
@pytest.mark.parametrize(
    "regions",
    [
        [Rectangle(0, 3, 0, 4), Rectangle(3, 6, 0, 4)],
        [Rectangle(0, 6, 0, 1), Rectangle(0, 6, 1, 4)],
        [FlatRange(0, 7, 4), FlatRange(7, 24, 4)],
    ],
)
def test_statistics_of_shards_make_up_those_of_the_matrices(
    regions: list[ShardRegion], blocks: Any, transposed: bool, kind: StatisticKind
) -> None:
    if blocks == "unequal":
        blocks = [1, 3] if transposed else [1, 5]
    layouts = [Layout.of((6, 4), r, transposed=transposed, blocks=blocks, name="w") for r in regions]
    shards = [r.of(FULL).flatten(1) if isinstance(r, FlatRange) else r.of(FULL) for r in regions]
    sums = [lay.sums_of_squares(s, kind, torch.float64) for lay, s in zip(layouts, shards, strict=True)]
    dims = {"matrix": (1, 2), "column": (1,), "row": (2,)}[kind]
    expected = [matrix.double().square().sum(dim=dims, keepdim=True) for matrix in layouts[0].matrices(FULL)]
    for parts, whole in zip(zip(*sums, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(parts), whole)
    statistic = torch.cat([block.flatten(1) for block in expected], dim=1).view(2, *layouts[0].statistic_shape(kind))
    for view, whole in zip(layouts[0].by_block(statistic, kind), expected, strict=True):
        assert torch.equal(view, whole)
    found = [
        lay.collect(lay.spread(expected, s.shape[1:]).expand(s.shape), kind)
        for lay, s in zip(layouts, shards, strict=True)
    ]
    torch.testing.assert_close(torch.maximum(*found), statistic)


def test_blocks_that_do_not_make_up_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected the blocks of w \(6, 4\) to add up to its 6 rows but got blocks=4"):
        Layout.of((6, 4), Rectangle(0, 6, 0, 4), transposed=False, blocks=4, name="w")
