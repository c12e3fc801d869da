"""Windows of tokens, the order of a pass, and what each rank loads of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_namo.gpt2.data.loaders import IGNORED, TokenWindows, TrainLoader, ValidationLoader, WindowOrder
from tests.helpers.text import global_order, unhurried, write_tokens


def windows_of(folder: Path, windows: int, block_size: int = 4) -> TokenWindows:
    return TokenWindows(write_tokens(folder / f"{windows}.bin", windows * block_size + 1), block_size)


def test_windows_predict_every_token_once(tmp_path: Path) -> None:
    windows = TokenWindows(write_tokens(tmp_path / "x.bin", 15), block_size=4)
    assert len(windows) == 3  # 14 tokens to predict, of which the last 2 fill no window
    inputs, targets = windows[[0, 2]]
    assert inputs.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert targets.tolist() == [[1, 2, 3, 4], [9, 10, 11, 12]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_ids_above_the_signed_range_are_read_right(tmp_path: Path) -> None:
    np.array([65_535, 1, 40_000], dtype="<u2").tofile(tmp_path / "x.bin")
    assert TokenWindows(tmp_path / "x.bin", 2)[[0]][0].tolist() == [[65_535, 1]]


@unhurried
@given(windows=st.integers(1, 50), seed=st.integers(0, 2**32), position=st.integers(0, 200), count=st.integers(1, 120))
def test_a_pass_is_a_permutation_and_any_part_of_the_order_can_be_taken(
    windows: int, seed: int, position: int, count: int
) -> None:
    order = WindowOrder(windows, seed)
    passes = math.ceil((position + count) / windows)
    whole = np.concatenate([order.take(n * windows, windows) for n in range(passes)])
    for n in range(passes):
        assert sorted(whole[n * windows : (n + 1) * windows]) == list(range(windows))
    assert (WindowOrder(windows, seed).take(position, count) == whole[position : position + count]).all()


def test_passes_and_seeds_differ() -> None:
    first, second = (WindowOrder(100, 0).take(n * 100, 100).tolist() for n in range(2))
    assert first != second
    assert first != WindowOrder(100, 1).take(0, 100).tolist()


@unhurried
@given(windows=st.integers(1, 60), batch_size=st.integers(1, 5), replicas=st.integers(1, 4))
def test_ranks_together_see_every_window_once_in_a_pass(
    tmp_path_factory: pytest.TempPathFactory, windows: int, batch_size: int, replicas: int
) -> None:
    windows = max(windows, batch_size * replicas)
    dataset = windows_of(tmp_path_factory.mktemp("x"), windows)
    loaders = [TrainLoader(dataset, batch_size, seed=7, replicas=replicas, rank=rank) for rank in range(replicas)]
    order: list[int] = []
    while len(order) < 2 * windows:  # Lightning's epochs, one after the other
        order += global_order(loaders, len(loaders[0]))
    assert sorted(order[:windows]) == sorted(order[windows : 2 * windows]) == list(range(windows))


@unhurried
@given(
    windows=st.integers(12, 60),
    before=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 25)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 4)),
)
def test_another_number_of_ranks_continues_without_a_window_lost_or_repeated(
    tmp_path_factory: pytest.TempPathFactory, windows: int, before: tuple[int, int, int], after: tuple[int, int]
) -> None:
    dataset = windows_of(tmp_path_factory.mktemp("x"), windows)
    batch_size, replicas, batches = before
    batches = min(batches, windows // (batch_size * replicas))
    old = [TrainLoader(dataset, batch_size, seed=1, replicas=replicas, rank=rank) for rank in range(replicas)]
    order = global_order(old, batches)
    states = [loader.state_dict() for loader in old]
    assert all(state == states[0] for state in states)  # Lightning saves rank 0's

    batch_size, replicas = after
    new = [TrainLoader(dataset, batch_size, seed=1, replicas=replicas, rank=rank) for rank in range(replicas)]
    for loader in new:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    order += global_order(new, len(new[0]))
    assert order == WindowOrder(windows, 1).take(0, len(order)).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_counts_what_was_handed_over_and_not_what_was_read_ahead(tmp_path: Path, num_workers: int) -> None:
    dataset = windows_of(tmp_path, 40)
    loader = TrainLoader(dataset, 2, seed=3, num_workers=num_workers)
    iterator = iter(loader)
    seen = torch.cat([next(iterator)[0][:, 0] for _ in range(5)])
    assert loader.state_dict() == {"epoch": 0, "consumed": 10, "windows": 40, "seed": 3}
    resumed = TrainLoader(dataset, 2, seed=3, num_workers=num_workers)
    resumed.load_state_dict(loader.state_dict())
    seen = torch.cat([seen, next(iter(resumed))[0][:, 0]])
    assert (seen // 4).tolist() == WindowOrder(40, 3).take(0, 12).tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_depend_on_seed_pass_and_rank_alone(tmp_path: Path, num_workers: int) -> None:
    dataset = windows_of(tmp_path, 40)

    def batches(seed: int, epoch: int, rank: int) -> list[list[int]]:
        loader = TrainLoader(dataset, 2, seed=seed, replicas=2, rank=rank, num_workers=num_workers)
        loader.load_state_dict({"epoch": epoch, "consumed": 0, "windows": 40, "seed": seed})
        return [(inputs[:, 0] // 4).tolist() for inputs, _ in loader]

    first = batches(1, 0, 0)
    assert first == batches(1, 0, 0)
    others = [batches(2, 0, 0), batches(1, 1, 0), batches(1, 0, 1)]
    assert all(first != other for other in others)
    assert {window for batch in first for window in batch}.isdisjoint(window for batch in others[2] for window in batch)


@unhurried
@given(windows=st.integers(1, 40), batch_size=st.integers(1, 5), replicas=st.integers(1, 4))
def test_validation_takes_every_window_once_in_as_many_batches_on_every_rank(
    tmp_path_factory: pytest.TempPathFactory, windows: int, batch_size: int, replicas: int
) -> None:
    dataset = windows_of(tmp_path_factory.mktemp("x"), windows)
    seen: list[int] = []
    for rank in range(replicas):
        loader = ValidationLoader(dataset, batch_size, replicas, rank, num_workers=0)
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(windows / (batch_size * replicas))
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (batch_size, 4)
            counted = (targets != IGNORED).all(dim=1)
            assert ((targets == IGNORED).all(dim=1) | counted).all()
            seen += (inputs[counted][:, 0] // 4).tolist()
    assert sorted(seen) == list(range(windows))


def test_token_files_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    for content in (b"\0" * 21, b"\0" * 8):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(ValueError, match=rf"at least block_size \+ 1 = 5 .* in .*x.bin. Got {len(content)} bytes"):
            TokenWindows(tmp_path / "x.bin", block_size=4)


def test_too_few_windows_for_a_global_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size \* ranks = 4 \* 3 windows of 4 tokens in .*11.bin. Got 11"):
        TrainLoader(windows_of(tmp_path, 11), 4, seed=0, replicas=3)


def test_a_state_of_other_data_or_another_seed_is_refused(tmp_path: Path) -> None:
    state = TrainLoader(windows_of(tmp_path, 11), 2, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"windows \(data, block_size\), 11. Got 12"):
        TrainLoader(windows_of(tmp_path, 12), 2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"seed, 0. Got 5"):
        TrainLoader(windows_of(tmp_path, 11), 2, seed=5).load_state_dict(state)
