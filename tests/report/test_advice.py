"""Each piece of advice, with numbers that call for it and numbers that do not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_namo.report.advice import advice, batch_of
from lightning_namo.report.matrices import layers_section
from lightning_namo.report.runs import Run
from lightning_namo.report.sections import all_sections
from tests.report.logged import logged_run, optimizer

BATCH = 16
STEPS = range(20)


def noisy_run(kind: str = "", **rhos: float) -> Run:
    """A run with the same signal fraction of a matrix at every step."""
    bound = {"": "", "_at_most": "_at_least"}.get(kind)
    scalars = {"val/loss": {0: 1.0}}
    for matrix, rho in rhos.items():
        scalars[f"signal_fraction{kind}/{matrix}"] = dict.fromkeys(STEPS, rho)
        if bound is not None:
            scalars[f"noise_scale{bound}/{matrix}"] = dict.fromkeys(STEPS, BATCH * (1 - rho) / rho)
    return logged_run("run", scalars)


def test_numbers_that_call_for_nothing_give_no_advice() -> None:
    run = noisy_run(a=0.5, b=0.3)
    assert advice([run]) == []
    assert all_sections([run], 0.0)[0].lines == ["None: no number calls for a change."]


@pytest.mark.parametrize("kind", ["", "_at_most"])
def test_the_batch_follows_from_what_was_logged(kind: str) -> None:
    assert batch_of(noisy_run(kind, a=0.05)) == pytest.approx(BATCH)
    assert batch_of(logged_run("run", {"signal_fraction/a": {0: 0.5}, "noise_scale/a": {1: 16.0}})) is None
    assert batch_of(noisy_run("_negative", a=-0.1)) is None


def test_a_small_fraction_is_to_be_measured_before_the_batch_is_enlarged() -> None:
    (words,) = advice([noisy_run(a=0.5, b=0.19, c=0.201)])  # 4 times the batch is at 0.2
    assert words == (
        "The noise scale is more than 4 times the batch in run (1 of 3 matrices, batch 16: b 68). That is noise, or a "
        "signal that turns within the steps that the momentum averages: measure it with GradientNoiseScale before you "
        "enlarge the batch."
    )
    (words,) = advice([noisy_run("_at_most", a=0.01)])
    assert "a at least 1,584" in words


def test_a_large_fraction_is_safe_to_act_on() -> None:
    (words,) = advice([noisy_run(a=0.5, b=0.81, c=0.79)])  # a fourth of the batch is at 0.8
    assert words.startswith(
        "The noise scale is less than a fourth of the batch in run (1 of 3 matrices, batch 16: b 3.8)."
    )
    assert "smaller batches would do" in words
    assert advice([noisy_run("_at_most", a=0.9)]) == [], "the bound says nothing"


def test_what_several_runs_have_in_common_is_said_once_and_of_six_runs() -> None:
    runs = [noisy_run(a=0.1, b=0.1, c=0.1) for _ in range(8)]
    for number, run in enumerate(runs):
        run.name = f"run_{number}"
    (words,) = advice(runs)
    assert "run_0 (3 of 3 matrices, batch 16: a 144, b 144 and 1 more), run_1 (3 of" in words
    assert "and 3 more. That is noise" in words


def test_negative_fractions_of_most_matrices_ask_for_a_comparison() -> None:
    scalars = {f"signal_fraction_negative/{matrix}": dict.fromkeys(STEPS, -0.1) for matrix in "ab"}
    known = noisy_run(c=0.5).curves

    def with_known(count: int) -> Run:
        run = logged_run("run", dict(list(scalars.items())[:count]))
        run.curves.update(known)
        return run

    (words,) = advice([with_known(2)])
    assert words.startswith("The signal fraction is negative in run (2 of 3 matrices): ")
    assert "compare runs with a lower one" in words
    assert advice([with_known(1)]) == []


def test_the_last_readings_count() -> None:
    run = logged_run(
        "run",
        {
            "signal_fraction/a": {step: 0.01 if step < 5 else 0.5 for step in STEPS},
            "noise_scale/a": {step: 1584.0 if step < 5 else 16.0 for step in STEPS},
        },
    )
    assert advice([run]) == []


@pytest.mark.parametrize(("share", "said"), [(0.12, True), (0.1, False)])
@pytest.mark.parametrize("matrix", ["h.0.weight", "median"])
def test_values_that_newton_schulz_cannot_lift(share: float, said: bool, matrix: str) -> None:
    run = logged_run("run", {f"unlifted_share_momentum/{matrix}": dict.fromkeys(STEPS, share)})
    words = advice([run])
    assert len(words) == said
    if said:
        assert "ns_steps" in words[0]
        assert "polar_express" in words[0]
        assert "12%)" in words[0]


def sweep(*losses: float) -> list[Run]:
    rates: list[dict[str, Any]] = [optimizer(lr=10.0**i) for i in range(len(losses))]
    return [logged_run(f"run_{i}", {"val/loss": {0: loss}}, optim=rates[i]) for i, loss in enumerate(losses)]


def test_a_winner_at_the_edge_of_its_sweep() -> None:
    assert advice(sweep(2.0, 1.0, 3.0)) == []
    (words,) = advice(sweep(1.0, 2.0, 3.0))
    assert words == "Learning rates, all runs: the best, 1, is the lowest that was tried. Try lower ones."
    (words,) = advice(sweep(3.0, 2.0, 1.0))
    assert words == "Learning rates, all runs: the best, 100, is the highest that was tried. Try higher ones."


def test_skipped_steps_are_said_once_for_all_runs() -> None:
    runs = [logged_run(f"run_{i}", {"skipped_steps/max": {1: 0.0, 9: float(i)}}) for i in range(6)]
    (words,) = advice(runs)
    assert words.startswith("Steps were skipped in run_5 (5 steps), run_4 (4 steps), run_3 (3 steps) and 2 more: ")
    assert advice(runs[:1]) == []


@pytest.mark.parametrize("tag", ["train/loss", "val/loss"])
def test_a_loss_that_is_not_finite(tag: str) -> None:
    assert advice([logged_run("run", {tag: {1: 1.0, 5: 1.0}})]) == []
    (words,) = advice([logged_run("run", {tag: {1: 1.0, 5: math.inf, 6: math.nan}})])
    assert words.startswith("The loss is not finite in run (2 of 3 times it was logged, first at step 5). Lower the ")


def test_medians_alone_have_advice_too() -> None:
    """As of a model with more than 64 matrices."""
    (noisy,) = advice([noisy_run(median=0.01, min=0.01, max=0.01)])
    assert "4 times the batch in run (the median of all matrices, batch 16: " in noisy
    (swinging,) = advice([noisy_run("_negative", median=-0.1)])
    assert "The signal fraction is negative in run (the median of all matrices)" in swinging


def test_runs_without_a_reading_take_no_place_among_those_that_are_looked_at() -> None:
    silent = [logged_run(f"silent_{i}", {"val/loss": {0: 0.1}}) for i in range(6)]
    noisy = [noisy_run(a=0.01) for _ in range(7)]
    (words,) = advice([*silent, *noisy])
    assert "in run (1 of 1 matrices" in words
    assert words.endswith("(Of 7 runs, the 6 with the lowest loss.)")


def test_a_stale_noise_scale_is_not_the_last(tmp_path: Path) -> None:
    run = noisy_run(median=0.5)
    negative = noisy_run("_negative", median=-0.1).curves["signal_fraction_negative/median"]
    run.curves["signal_fraction_negative/median"] = replace(negative, steps=negative.steps + 50)
    table = layers_section([run]).table
    assert table is not None
    assert table.rows == [["run", "-", "-0.1", "-"]]
