"""The error of a signal fraction against simulated gradients, and what is given as a bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_namo.optim.formulas import HyperParameters, signal_fraction
from lightning_namo.telemetry.noise import Averages, SignalFraction, noise_scale, variance

ELEMENTS, RUNS = 100, 1500


def simulated(averages: Averages, rho: float, steps: list[int]) -> dict[int, np.ndarray]:
    """Estimates of many runs at some steps, by the formula that the rules report."""
    rng = np.random.default_rng(0)
    mu, b2 = averages.momentum, averages.beta2
    h = HyperParameters(momentum=mu, nesterov=averages.nesterov, beta2=b2)
    signal = np.zeros(ELEMENTS)
    signal[0] = math.sqrt(rho)
    m, v, found = np.zeros((RUNS, ELEMENTS)), np.zeros(RUNS), {}
    for t in range(1, max(steps) + 1):
        g = signal + math.sqrt((1 - rho) / ELEMENTS) * rng.standard_normal((RUNS, ELEMENTS))
        m, v = mu * m + (1 - mu) * g, b2 * v + (1 - b2) * (g**2).sum(axis=1)
        if t in steps:
            n = mu * m + (1 - mu) * g if averages.nesterov else m
            squares, second = torch.tensor((n**2).sum(axis=1)), torch.tensor(v)
            found[t] = signal_fraction(squares, second, torch.tensor(float(t)), h).numpy()
    return found


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.3, 0.8])
def test_estimates_are_without_bias_and_as_far_off_as_is_said(rho: float, nesterov: bool) -> None:
    averages = Averages(0.95, nesterov, 0.99)
    found = simulated(averages, rho, [3, 30, 295, 300])
    for step, estimates in found.items():
        error = math.sqrt(variance(averages, rho, step) / ELEMENTS)
        assert estimates.std() == pytest.approx(error, rel=0.1)
        assert estimates.mean() == pytest.approx(rho, abs=4 * error / math.sqrt(RUNS) + 0.001)
    apart = math.sqrt(variance(averages, rho, 300, 5) / ELEMENTS)
    assert (found[300] - found[295]).std() == pytest.approx(apart, rel=0.1)


def test_the_estimate_is_the_published_one_at_the_limit() -> None:
    step, mu = torch.tensor(1e6), 0.95
    for nesterov, kappa in {
        False: (1 - mu) / (1 + mu),
        True: (1 - mu) * (1 + 2 * mu - 2 * mu**3) / (1 + mu),
    }.items():
        h = HyperParameters(momentum=mu, nesterov=nesterov, beta2=0.99)
        found = signal_fraction(torch.tensor(0.2), torch.tensor(1.0), step, h)
        assert found.item() == pytest.approx((0.2 - kappa) / (1 - kappa), rel=1e-5)


def test_averages_that_say_nothing_give_no_number() -> None:
    one = torch.tensor(1.0)
    h = HyperParameters(momentum=0.95, nesterov=True, beta2=0.99)
    assert signal_fraction(one, one, one, h).isnan()  # one gradient is its own average
    assert signal_fraction(one * 0, one * 0, one * 9, h).isnan()
    assert signal_fraction(one, one, one * 9, HyperParameters(momentum=0.0, nesterov=True, beta2=0.99)).isnan()


def test_bounds_hold_and_numbers_are_told_from_zero() -> None:
    """At three standard errors: of noise hardly any is called a signal, and bounds are above the truth."""
    averages, steps = Averages(0.95, True, 0.99), list(range(200, 301, 5))
    for rho in (0.0, 0.05):
        found, called, missed = simulated(averages, rho, steps), 0, 0
        for run in range(300):
            signal = SignalFraction(averages)
            for step in steps:
                signal.add(step, float(found[step][run]))
            estimate = signal.estimate()
            assert estimate is not None
            called += estimate.kind == "value"
            missed += estimate.kind != "value" and estimate.rho < rho
        assert missed <= 3
        assert called <= 6 if rho == 0 else called > 240


def test_errors_follow_how_far_readings_differ() -> None:
    """Noise in few directions makes readings differ more: the error knows without being told how many there are."""
    averages, steps = Averages(0.95, False, 0.99), list(range(200, 301, 5))
    found = simulated(averages, 0.3, steps)
    errors = []
    for run in range(200):
        signal = SignalFraction(averages)
        for step in steps:
            signal.add(step, float(found[step][run]))
        errors.append(signal.error())
    assert np.mean(errors) == pytest.approx(found[300].std(), rel=0.15)


def test_a_state_that_goes_back_starts_the_readings_anew() -> None:
    signal = SignalFraction(Averages(0.95, True, 0.99))
    assert signal.estimate() is None
    signal.add(100, 0.5)
    signal.add(200, 0.9)
    signal.add(150, 0.5)
    assert signal.error() == pytest.approx(math.sqrt(variance(signal.averages, 0.5, 150) / 16))
    signal.add(160, math.nan)
    assert signal.last == 0.5


def test_a_step_that_is_skipped_or_not_taken_says_nothing() -> None:
    signal = SignalFraction(Averages(0.95, True, 0.99))
    for step in range(100, 200, 10):
        signal.add(step, 0.5 + step / 1e4)
    error = signal.error()
    signal.add(190, math.nan)
    signal.add(190, 0.9)
    assert (signal.last, signal.error()) == (0.519, error)


def test_noise_scale() -> None:
    assert noise_scale(0.25, 32) == 96.0
