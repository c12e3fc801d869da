"""Event files: read like TensorBoard does, resumed, and broken."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_namo.report.events import read_event_file, read_folder
from tests.report.logged import write


def values(folder: Path, tag: str) -> dict[int, float]:
    found = read_folder(folder)[0][tag]
    return dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))


def test_scalars_are_read_as_tensorboard_reads_them(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(0, 300, 3):
            writer.add_scalar("train/loss", math.nan if step == 30 else 5 / (step + 1), step)
            if step % 9 == 0:
                writer.add_scalars("both", {"a": step, "b": -step}, step)
                writer.add_histogram("weights", np.arange(step + 2.0), step)
                writer.add_text("words", "some", step)
            writer.add_scalar("epoch", step // 100, step)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 3  # `add_scalars` makes folders of its own
    for file in files:
        expected = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        found = read_event_file(file)
        assert list(found.curves) == expected.Tags()["scalars"]
        assert found.broken is None
        for tag, curve in found.curves.items():
            scalars = expected.Scalars(tag)
            assert curve.steps.tolist() == [scalar.step for scalar in scalars]
            np.testing.assert_array_equal(curve.values, [scalar.value for scalar in scalars])
            assert curve.seconds.tolist() == [scalar.wall_time for scalar in scalars]


def test_a_later_file_wins_from_its_first_step_on(tmp_path: Path) -> None:
    write(tmp_path, {"a": dict.fromkeys(range(10), 1.0), "val": {4: 1.0, 8: 1.0}}, began=1000)
    write(tmp_path, {"a": dict.fromkeys(range(7, 9), 3.0)}, began=9000)
    write(tmp_path, {"a": dict.fromkeys(range(5, 8), 2.0)}, began=5000)  # before, by its clock
    assert values(tmp_path, "a") == {**dict.fromkeys(range(5), 1.0), 5: 2.0, 6: 2.0, 7: 3.0, 8: 3.0}
    assert values(tmp_path, "val") == {4: 1.0}, "what was logged after the step that was gone back to is stale"
    seconds = read_folder(tmp_path)[0]["a"].seconds
    assert seconds.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6], "without the pauses, and without steps done twice"


def test_an_evaluation_wins_at_its_step_only(tmp_path: Path) -> None:
    write(tmp_path, {"a": {1: 1.0, 2: 1.0, 3: 1.0}}, began=1000)
    write(tmp_path, {"a": {2: 7.0}, "test/loss": {2: 3.0}}, began=2000)
    assert values(tmp_path, "a") == {1: 1.0, 2: 7.0, 3: 1.0}
    assert values(tmp_path, "test/loss") == {2: 3.0}
    assert read_folder(tmp_path)[0]["a"].steps.tolist() == [1, 2, 3]


def test_what_is_logged_at_other_steps_does_not_go_back(tmp_path: Path) -> None:
    write(tmp_path, {"a": {1: 1.0, 2: 1.0, 3: 1.0}, "test/loss": {3: 1.0}}, began=1000)
    later = {
        "a": {3: 2.0, 4: 2.0},
        "hp_metric": {0: -1.0},
        "validate/time": {1: 0.1},
        "test/device/items_per_sec": {1: 9.0},
    }
    write(tmp_path, later, began=2000)
    assert values(tmp_path, "a") == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}
    assert set(read_folder(tmp_path)[0]) == {"a"}


def test_a_clock_that_is_set_back_gives_no_negative_time(tmp_path: Path) -> None:
    write(tmp_path, {"a": {1: 1.0, 5: 1.0}}, began=1000)  # the first record of the file has today's time
    assert read_folder(tmp_path)[0]["a"].seconds.tolist() == [0, 4]


STEPS = 50


def whole(folder: Path) -> tuple[Path, bytes]:
    path = write(folder, {"a": {step: float(step) for step in range(STEPS)}})
    return path, path.read_bytes()


@pytest.mark.parametrize("missing", [1, 4, 5, 20])
def test_a_last_record_that_is_cut_short_is_left_out_and_said(tmp_path: Path, missing: int) -> None:
    path, content = whole(tmp_path)
    path.write_bytes(content[:-missing])
    assert values(tmp_path, "a") == {step: float(step) for step in range(STEPS - 1)}
    (words,) = read_folder(tmp_path)[1]
    assert words.startswith(f"{path.name}: the last record, at byte ")
    assert "cut short" in words


def test_a_header_that_is_cut_short_is_said(tmp_path: Path) -> None:
    path, content = whole(tmp_path)
    path.write_bytes(content + b"\x05\0\0")
    assert len(values(tmp_path, "a")) == STEPS
    assert f"at byte {len(content):,}, is cut short" in read_folder(tmp_path)[1][0]


@pytest.mark.parametrize("gap", [1, 3, 8, 40, 111])
def test_bytes_that_are_missing_in_the_middle_end_the_reading(tmp_path: Path, gap: int) -> None:
    path, content = whole(tmp_path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + content[middle + gap :])
    found = values(tmp_path, "a")
    assert STEPS // 2 - 3 <= len(found) <= STEPS // 2 + 3
    assert all(step == value for step, value in list(found.items())[:-1])
    (words,) = read_folder(tmp_path)[1]
    assert "no length of a record at byte " in words or "no event in the record that ends at byte " in words


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "it is empty"), (b"no event file, but words", "no length of a record at byte 0"), (b"\0" * 64, "at byte 0")],
)
def test_a_file_of_something_else_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    write(tmp_path, {"a": {1: 1.0}})
    (tmp_path / "events.out.tfevents.1.other").write_bytes(content)
    curves, broken = read_folder(tmp_path)
    assert list(curves) == ["a"]
    assert [words in line for line in broken] == [True]


def test_an_evaluator_beside_a_run_leaves_its_curves_alone(tmp_path: Path) -> None:
    write(tmp_path, {"train/loss": dict.fromkeys(range(10), 1.0)}, began=1000)
    write(tmp_path, {"val/loss": {2: 3.0, 4: 3.0, 6: 3.0}}, began=2000)
    assert set(values(tmp_path, "train/loss")) == set(range(10))
    assert values(tmp_path, "val/loss") == {2: 3.0, 4: 3.0, 6: 3.0}


def test_what_cannot_be_opened_is_broken(tmp_path: Path) -> None:
    write(tmp_path, {"train/loss": {0: 1.0}})
    (tmp_path / "events.out.tfevents.1.gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "events.out.tfevents.2.folder").mkdir()
    curves, broken = read_folder(tmp_path)
    assert set(curves) == {"train/loss"}
    assert [line.partition(": ")[2] for line in broken] == [
        "it cannot be read (No such file or directory).",
        "it cannot be read (Is a directory).",
    ]
