"""What is drawn: curves, smoothed and thinned, heat maps and spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_namo.report.curves import binned, points_of, smoothed
from lightning_namo.report.drawing import colors_of
from lightning_namo.report.heat import Reading, heat_map
from lightning_namo.report.loss import loss_section
from lightning_namo.report.matrices import clamps_section, layers_section, spectra_section
from lightning_namo.report.readings import ordered, over_matrices
from tests.report.logged import Scalars, logged_run

SIGNAL = Reading("signal_fraction", ("", "_at_most", "_negative"), log=True)


def test_bins_have_equal_numbers_of_points_and_their_means() -> None:
    assert binned(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert binned(np.arange(4.0), 5).tolist() == [0, 1, 2, 3]
    found = binned(np.arange(1003.0), 100)
    assert len(found) == 100
    assert np.all(np.abs(np.diff(found) - 10.03) < 1)
    assert [points_of(runs) for runs in (1, 10, 50, 1000)] == [500, 500, 100, 50]


def test_smoothing_is_an_average_without_bias_that_shows_what_is_not_finite() -> None:
    assert smoothed(np.full(5, 3.0), 0.9) == pytest.approx(3.0)
    found = smoothed(np.array([math.nan, 1.0, math.nan, 2.0]), 0.5)
    assert found.tolist() == pytest.approx([math.nan, 1, math.nan, 5 / 3], nan_ok=True)
    assert smoothed(np.arange(3.0), 0.0).tolist() == [0, 1, 2]


def losses(count: int = 4) -> Scalars:
    steps = range(0, 10 * count, 10)
    return {
        "train/loss": {step: 5.0 - step / 10 for step in steps},
        "val/loss": dict.fromkeys(steps, 4.0),
        "train/lengths": {step: 100.0 * (step + 1) for step in steps},
    }


def test_loss_is_drawn_against_steps_tokens_and_time() -> None:
    section = loss_section([logged_run("a", losses())], 0.0)
    assert [drawing.heading for drawing in section.drawings] == [
        f"Loss against {x}" for x in ("steps", "tokens", "time")
    ]
    axes = [[0, 10, 20, 30], [100, 1100, 2100, 3100], [0, 10, 20, 30]]
    for drawing, x in zip(section.drawings, axes, strict=True):
        assert [trace.x.tolist() for trace in drawing.figure.data] == [x, x]
        assert drawing.figure.data[0].y.tolist() == [5, 4, 3, 2]
    assert section.lines == ["Curves longer than 500 points are drawn as means over equal numbers of points."]


def test_losses_and_tokens_that_were_not_logged_are_said() -> None:
    whole, none = logged_run("whole", losses()), logged_run("bare", {"a": {0: 1.0}})
    train = logged_run("train", {"train/loss": {0: 1.0}})
    lines = loss_section([whole, none, train], 0.0).lines
    assert "train/loss was not logged in bare." in lines
    assert "val/loss was not logged in bare, train." in lines
    assert any(line.startswith("Tokens are not known") and line.endswith("in bare, train.") for line in lines)
    assert loss_section([none], 0.0).drawings == []


def test_smoothing_is_said() -> None:
    section = loss_section([logged_run("a", losses())], 0.9)
    assert "smoothed exponentially with weight 0.9" in section.lines[0]
    assert section.drawings[0].figure.data[0].y[-1] > 2


def test_few_runs_have_a_legend_and_many_have_the_table() -> None:
    for count, legend in ((1, 0), (2, 2), (10, 10), (11, 0)):
        section = loss_section([logged_run(str(i), losses()) for i in range(count)], 0.0)
        assert len(section.drawings[0].legend) == legend


def test_matrices_are_in_order_of_role_and_depth_with_short_names() -> None:
    names = [f"net.h.{depth}.{role}.weight" for depth in (0, 10, 2) for role in ("attn.qkv", "mlp.fc")]
    assert list(ordered(names).values()) == [
        f"{role} {depth}" for role in ("attn.qkv", "mlp.fc") for depth in (0, 2, 10)
    ]
    assert ordered(["h.0.weight", "h.1.weight"]) == {"h.0.weight": "weight 0", "h.1.weight": "weight 1"}
    assert ordered(["a"]) == {"a": "a"}
    assert ordered([]) == {}
    experts = [f"h.{depth}.w[{i}]" for depth in (1, 0) for i in (0, 1)]
    assert list(ordered(experts)) == ["h.0.w[0]", "h.1.w[0]", "h.0.w[1]", "h.1.w[1]"]


def test_a_cell_is_the_mean_of_its_most_frequent_kind_and_bounds_are_a_layer_of_their_own() -> None:
    scalars = {
        "signal_fraction/h.0.w": {0: 0.5, 1: 0.25},
        "signal_fraction_at_most/h.0.w": {2: 0.1},
        "signal_fraction_at_most/h.1.w": {0: 0.2, 1: 0.2},
        "signal_fraction_negative/h.1.w": {2: -0.3},
    }
    figure = heat_map(logged_run("a", scalars), SIGNAL, 1000)
    assert figure is not None
    value, bound, negative = figure.data
    nan = math.nan
    np.testing.assert_allclose(value.customdata, [[0.5, 0.25, nan], [nan] * 3])
    np.testing.assert_allclose(value.z, np.log10([[0.5, 0.25, nan], [nan] * 3]), rtol=1e-6)
    np.testing.assert_allclose(bound.customdata, [[nan, nan, 0.1], [0.2, 0.2, nan]])
    np.testing.assert_allclose(negative.z, [[nan] * 3, [nan, nan, -0.3]])
    assert "at most" in bound.hovertemplate
    assert "at most" not in value.hovertemplate
    assert value.colorscale != bound.colorscale
    assert list(value.y) == ["w 0", "w 1"]


def test_many_steps_are_means_over_columns() -> None:
    scalars = {f"step_scale/h.{i}.w": {step: float(step + 1) for step in range(1000)} for i in range(3)}
    figure = heat_map(logged_run("a", scalars), Reading("step_scale"), 12_000)
    assert figure is not None
    (trace,) = figure.data
    assert trace.z.shape == (3, 120)
    assert trace.z.mean() == pytest.approx(500.5, rel=1e-3)
    assert np.all(np.diff(trace.x) > 0)
    many = {f"step_scale/h.{i}.w": dict.fromkeys(range(200), 1.0) for i in range(400)}
    assert heat_map(logged_run("a", many), Reading("step_scale"), 12_000).data[0].z.shape == (400, 30)


def test_aggregates_alone_are_drawn_and_nothing_is_none() -> None:
    figure = heat_map(
        logged_run("a", {"step_scale/min": {0: 0.1}, "step_scale/median": {0: 0.2}}), Reading("step_scale"), 12_000
    )
    assert figure is not None
    assert list(figure.data[0].y) == ["min", "median"]
    assert heat_map(logged_run("a", {"loss": {0: 0.1}}), Reading("step_scale"), 12_000) is None


def test_layers_are_shown_of_six_runs_and_the_newest_median_is_in_the_table() -> None:
    scalars = {
        "step_scale/h.0.w": {0: 0.5},
        "step_scale/median": {0: 0.5},
        "signal_fraction/median": {0: 0.7},
        "signal_fraction_at_most/median": {5: 0.01},
    }
    section = layers_section([logged_run(f"r{i}", scalars) for i in range(8)])
    assert [drawing.folded for drawing in section.drawings] == 2 * ([False] + 5 * [True])
    assert "the 6 runs with the lowest loss" in " ".join(section.lines)
    assert "Not logged by any run: noise scale (samples)" in section.lines[0]
    assert section.table is not None
    assert section.table.rows[0] == ["r0", "0.5", "at most 0.01", "-"]


def test_a_median_that_was_not_logged_is_taken_over_the_matrices() -> None:
    run = logged_run("a", {"x/a": {0: 1.0, 1: 5.0}, "x/b": {0: 3.0}, "x/c": {0: 9.0, 2: math.nan}})
    found = over_matrices(run, "x")
    assert found is not None
    np.testing.assert_array_equal(found.values, [3.0, 5.0, math.nan])
    assert over_matrices(run, "x", "max").values[0] == 9
    assert over_matrices(run, "y") is None


def spectra() -> Scalars:
    quantiles = {"q0": 0.01, "q25": 0.1, "q50": 1.0, "q75": 2.0, "q100": 9.0}
    names = {f"sigma_{of}_{q}": value for of in ("gradient", "momentum") for q, value in quantiles.items()}
    return {f"{name}/median": {0: value, 10: value} for name, value in {**names, "stable_rank_momentum": 3.0}.items()}


def test_spectra_are_a_fan_and_lines_and_the_rest_is_said() -> None:
    section = spectra_section([logged_run("a", spectra())])
    fan, rank = section.drawings
    assert [trace.y[0] for trace in fan.figure.data] == pytest.approx(2 * [0.01, 0.1, 1.0, 2.0, 9.0])
    assert [trace.fill for trace in fan.figure.data] == 2 * [None, None, "tonexty", "tonexty", None]
    assert rank.heading == "Stable rank"
    assert "alignment_momentum" in section.lines[-1]
    assert "stable_rank_momentum" not in section.lines[-1]
    (line,) = spectra_section([logged_run("a", {})]).lines
    assert line == "Not logged by any run: spectra of gradient and momentum (the callback SpectralMonitor logs them)."


def test_a_run_has_the_same_color_wherever_it_is_drawn() -> None:
    runs = [logged_run("bare", losses()), *(logged_run(name, {**losses(), **spectra()}) for name in "abcde")]
    expected = colors_of(runs)
    sections = [loss_section(runs, 0.0), spectra_section(runs), clamps_section(runs)]
    fan, rank = sections[1].drawings
    assert list(fan.legend) == ["a", "b", "c"]
    assert list(rank.legend) == ["a", "b", "c", "d", "e"]
    for drawing in [drawing for section in sections for drawing in section.drawings]:
        assert all(expected[name] == color for name, color in drawing.legend.items())
    runs += [logged_run(f"more {i}", {**losses(), **spectra()}) for i in range(6)]
    assert {trace.line.color for trace in spectra_section(runs).drawings[0].figure.data} == {
        colors_of(runs)[name] for name in "abc"
    }


def test_clamps_and_skipped_steps_are_lines_and_the_rest_is_said() -> None:
    run = logged_run("a", {"at_cap/median": {0: 0.5}, "skipped_steps/max": {0: 2.0}})
    section = clamps_section([run])
    assert [trace.y.tolist() for drawing in section.drawings for trace in drawing.figure.data] == [[0.5], [2.0]]
    assert section.lines == [
        "Not logged by any run: at_lower_clamp, at_upper_clamp (OptimizerCallback or ReadingLog logs them)."
    ]
