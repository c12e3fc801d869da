"""How far a signal fraction can be trusted, and the batch at which noise and signal are of one size.

The model: gradients ``G_i = S + X_i`` with one signal S and independent noises X_i, each of d independent elements
(d: the effective number, which is m n for white noise and far less in training). N and v are averages with known
weights w_i and u_i on the last steps, so an estimate is ``sum_ij A_ij <G_i, G_j> / scale`` with
``A = w w^T - q diag(u)``. For normal noise and ``||S||^2 + E||X||^2 = 1`` the variance of such a sum is
``(4 rho (1 - rho) |A 1|^2 + 2 (1 - rho)^2 ||A||_F^2) / d``. Nothing but the weights, which say how long the averages
are, and d is in it; d is found from how far readings that follow one another differ.

Numbers of one matrix on the host; the device computes `lightning_namo.optim.formulas.signal_fraction` alone.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

SURE = 3.0
"""In standard errors: a signal fraction that is closer to zero is given as a bound."""

_KEPT = 20  # readings
_ELEMENTS = 16  # d, until readings show it


@dataclass(frozen=True)
class Averages:
    """How N and v average the gradients.

    Attributes:
        momentum: mu1.
        nesterov: Whether N looks ahead.
        beta2: mu2.
    """

    momentum: float
    nesterov: bool
    beta2: float

    @property
    def length(self) -> int:
        """Steps after which older gradients weigh nothing."""
        return math.ceil(10 / (1 - max(self.momentum, self.beta2)))

    def weights(self, steps: int, ago: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Weights in N, and in v over their sum, of the gradients of the last steps, the newest first.

        Args:
            steps: How many steps were taken.
            ago: Of the averages as they were so many steps before.
        """
        age = np.arange(min(steps, self.length)) - ago
        past = age >= 0
        w = np.where(past, (1 - self.momentum) * self.momentum ** np.maximum(age, 0), 0.0)
        if self.nesterov:
            w = self.momentum * w + (1 - self.momentum) * (age == 0)
        u = np.where(past, self.beta2 ** np.maximum(age, 0), 0.0)
        return w, u / u.sum()


@lru_cache(maxsize=4096)
def variance(averages: Averages, rho: float, steps: int, apart: int | None = None) -> float:
    """Variance of an estimate of the signal fraction, times the noise's effective number of elements d.

    Args:
        averages: Whose lengths it follows from.
        rho: The signal fraction.
        steps: How many steps were taken.
        apart: Of the difference between this estimate and that of so many steps before, if given.
    """
    w, u = averages.weights(steps)
    scale = w.sum() ** 2 - w @ w
    q = rho * scale + w @ w  # what ||N||^2 / v is on the average
    ones, squares = w.sum() * w - q * u, (w @ w) ** 2 - 2 * q * (w**2 @ u) + q**2 * (u @ u)
    if apart is not None:
        w2, u2 = averages.weights(steps, apart)
        ones = ones - (w2.sum() * w2 - q * u2)
        squares = (w @ w) ** 2 + (w2 @ w2) ** 2 - 2 * (w @ w2) ** 2
        squares += -2 * q * ((w**2 - w2**2) @ (u - u2)) + q**2 * ((u - u2) @ (u - u2))
    return float((4 * rho * (1 - rho) * (ones @ ones) + 2 * (1 - rho) ** 2 * squares) / scale**2)


def noise_scale(rho: float, batch: float) -> float:
    """The batch size ``B_simple = B (1 - rho) / rho`` at which a batch's noise is as large as the signal.

    Args:
        rho: Signal fraction, above 0.
        batch: B, what one gradient averages over.

    References:
        "An Empirical Model of Large-Batch Training", arXiv 1812.06162, equation 2.9.
    """
    return batch * (1 - rho) / rho


@dataclass(frozen=True)
class Estimate:
    """A signal fraction, or what can be said of it.

    Attributes:
        rho: The number.
        kind: "value": a fraction that is told from zero. "at_most": a bound, where it is not. "negative": told from
            zero, too, but on the other side, where no fraction can be: the gradients of neighbouring steps oppose each
            other, since the signal swings faster than the averages follow, and how large it is they do not say.
    """

    rho: float
    kind: Literal["value", "at_most", "negative"]


class SignalFraction:
    """The readings of a matrix's signal fraction, and how far apart they are.

    Args:
        averages: Of its optimizer.
    """

    def __init__(self, averages: Averages) -> None:
        self.averages = averages
        self._readings: deque[tuple[int, float]] = deque(maxlen=_KEPT + 1)

    def add(self, step: int, rho: float) -> None:
        """Take a reading, of the matrix's step, counted from 1; one that is no number says nothing."""
        if not math.isfinite(rho):
            return
        if self._readings and step < self._readings[-1][0]:
            self._readings.clear()  # the state went back
        if not self._readings or step > self._readings[-1][0]:
            self._readings.append((step, rho))

    @property
    def last(self) -> float:
        """The last reading, below zero where gradients of neighbouring steps oppose each other."""
        return self._readings[-1][1]

    def error(self) -> float:
        """The standard error of the last reading."""
        step, rho = self._readings[-1]
        spreads = [1 / _ELEMENTS]
        for (first, before), (second, after) in itertools.pairwise(self._readings):
            expected = variance(self.averages, _rounded((before + after) / 2), self._settled(second), second - first)
            spreads.append((after - before) ** 2 / expected)
        per_element = sum(spreads) / len(spreads)
        return math.sqrt(variance(self.averages, _rounded(rho), self._settled(step)) * per_element)

    def _settled(self, step: int) -> int:
        """After the averages' length all steps are alike: their variances are kept."""
        return min(step, self.averages.length)

    def estimate(self) -> Estimate | None:
        """What the last reading says; None: there is none."""
        if not self._readings:
            return None
        rho, error = self.last, self.error()
        if rho < -SURE * error:
            return Estimate(rho, "negative")
        if rho < SURE * error:
            return Estimate(min(max(rho, 0.0) + SURE * error, 1.0), "at_most")
        return Estimate(min(rho, 1.0), "value")


def _rounded(rho: float) -> float:
    """To hundredths within [0, 0.99]: variances change slowly, and are kept."""
    return round(min(max(rho, 0.0), 0.99), 2)
