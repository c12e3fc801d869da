"""Learning-rate sweeps among runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_namo.report.advice import advice
from lightning_namo.report.runs import Run
from lightning_namo.report.valleys import valleys, valleys_section
from tests.report.logged import curve, logged_run, optimizer


def run(loss: float, lr: Any, seed: int = 0, tag: str = "val/loss", **init_args: Any) -> Run:
    name = f"{lr}_{seed}_{init_args}"
    config = {"optim": optimizer(lr=lr, **init_args), "seed_everything": seed, "data": {"seed": seed}}
    return logged_run(name, {tag: {1: 9.0, 2: loss}}, trainer={"logger": {"name": name}}, **config)


def test_runs_that_differ_in_rate_and_seed_are_a_sweep_and_seeds_are_averaged() -> None:
    (sweep,) = valleys([run(3.0, 0.1), run(1.0, 0.01), run(2.0, 0.01, seed=1), run(4.0, "1e-3")])
    assert sweep.means() == {0.001: 4.0, 0.01: 1.5, 0.1: 3.0}
    assert list(sweep.by_rate) == [0.001, 0.01, 0.1]
    assert (sweep.best(), sweep.loss, sweep.name) == (0.01, "val/loss", "all runs")


def test_other_settings_make_sweeps_of_their_own() -> None:
    runs = [run(1.0, 0.1, clamp=0.1), run(2.0, 0.2, clamp=0.1), run(3.0, 0.1, clamp=0.9), run(4.0, 0.2, clamp=0.9)]
    assert {sweep.name: sweep.means() for sweep in valleys(runs)} == {
        "clamp 0.1": {0.1: 1.0, 0.2: 2.0},
        "clamp 0.9": {0.1: 3.0, 0.2: 4.0},
    }
    assert valleys(runs[1:3]) == []


def test_seeds_alone_or_runs_without_settings_are_no_sweep() -> None:
    assert valleys([run(1.0, 0.1), run(2.0, 0.1, seed=1)]) == []
    assert valleys([logged_run(name, {"val/loss": {0: 1.0}}) for name in "ab"]) == []
    assert "No learning-rate sweep" in valleys_section([run(1.0, 0.1)]).lines[0]


def test_without_a_validation_it_is_the_training_loss() -> None:
    (sweep,) = valleys([run(1.0, 0.1, tag="train/loss"), run(2.0, 0.2, tag="train/loss")])
    assert sweep.loss == "train/loss"


def two_rates(first: float, second: float) -> Run:
    groups = {"a": {"lr": first}, "b": {"learning_rate": second}}
    return logged_run(f"{first} {second}", {"val/loss": {0: first + second}}, groups=groups)


def test_a_second_rate_splits_sweeps_unless_it_follows_from_the_first() -> None:
    (tied,) = valleys([two_rates(1, 10), two_rates(2, 20), two_rates(3, 30)])
    assert tied.means() == {1: 11, 2: 22, 3: 33}
    free = valleys([two_rates(1, 10), two_rates(2, 10), two_rates(3, 10), two_rates(1, 20), two_rates(2, 20)])
    assert [sweep.means() for sweep in free] == [{1: 11, 2: 12, 3: 13}, {1: 21, 2: 22}]
    assert [sweep.name for sweep in free] == ["learning_rate 10", "learning_rate 20"]


def test_a_rate_at_which_a_run_diverged_is_not_the_best() -> None:
    (sweep,) = valleys([run(math.nan, 0.1), run(0.0, 0.1, seed=1), run(1.0, 0.2)])
    assert sweep.best() == 0.2
    assert math.isnan(sweep.means()[0.1])
    (sweep,) = valleys([run(math.nan, 0.1), run(math.inf, 0.2)])
    assert sweep.best() is None


def test_runs_that_go_on_are_not_compared_in_silence() -> None:
    runs = [run(1.0, 0.1), run(2.0, 0.2), run(3.0, 0.3)]
    assert valleys_section(runs).lines == []
    runs[1].curves["val/loss"] = curve({100: 1.0})
    assert valleys_section(runs).lines[0].startswith("all runs: the last losses are of 3 to 101 steps and cannot be")
    assert advice(runs) == [], "none on losses that cannot be compared"


def test_a_rate_without_a_loss_yet_is_said_and_is_no_edge() -> None:
    runs = [run(3.0, 0.1), run(1.0, 0.2), run(2.0, 0.4)]
    del runs[0].curves["val/loss"]
    assert valleys_section(runs).lines == ["all runs: no val/loss yet at 0.1."]
    assert advice(runs) == []
    assert advice(runs[1:])[0].startswith("Learning rates, all runs: the best, 0.2, is the lowest that was tried.")


def test_small_losses_keep_their_digits() -> None:
    table = valleys_section([run(2.1e-5, 0.1), run(4.9e-5, 0.2)]).table
    assert table is not None
    assert [row[2] for row in table.rows] == ["2.1e-05", "4.9e-05"]


def test_the_figure_has_a_line_for_each_sweep_on_a_logarithmic_axis() -> None:
    section = valleys_section([run(1.0, 0.1), run(2.0, 0.2), run(3.0, 0.1, clamp=1.0), run(4.0, 0.2, clamp=1.0)])
    (drawing,) = section.drawings
    assert drawing.figure.layout.xaxis.type == "log"
    assert [list(trace.y) for trace in drawing.figure.data] == [[1.0, 2.0], [3.0, 4.0]]
    assert section.table is not None
    assert list(section.table.rows[0])[1:] == ["0.1", "1.0000", "1"]


@pytest.mark.parametrize("lr", [None, [0.1, 0.2], 0.0])
def test_a_rate_that_is_no_number_above_zero_is_passed_over(lr: Any) -> None:
    assert valleys([run(1.0, lr), run(2.0, 0.2), run(1.0, 0.1)])[0].means() == {0.1: 1.0, 0.2: 2.0}
