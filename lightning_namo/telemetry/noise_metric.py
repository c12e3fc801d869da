"""The gradient noise scale from gradients of two batch sizes, as a metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GradientNoiseScale(Metric):
    r"""The gradient noise scale ``B_simple = tr(Sigma) / |G|^2`` in samples, from squared norms at two batch sizes.

    ::

        |G|^2     = mean of (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)
        tr(Sigma) = mean of (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big)

    Both are without bias, and their means over updates and ranks are divided. All gradients are of the same weights, or
    of weights that hardly differ. The small batches may be the parts of the big one: the gradients of ranks or
    micro-batches before and after they are averaged.

    Args:
        layers: How many parameters are measured side by side.
        kwargs: torchmetrics': which processes the metric syncs with, and when.

    References:
        "An Empirical Model of Large-Batch Training", arXiv 1812.06162, appendix A.1.

    Example:
        >>> metric = GradientNoiseScale()
        >>> metric.update(small_sq=torch.tensor(5.0), big_sq=torch.tensor(2.0), small=1, big=4)
        >>> metric.compute()
        tensor(4.)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    signal: Tensor
    noise: Tensor

    def __init__(self, layers: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("signal", torch.zeros(layers), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros(layers), dist_reduce_fx="sum")

    def update(self, small_sq: Tensor, big_sq: Tensor, small: float, big: float) -> None:
        """Add squared norms of gradients.

        Args:
            small_sq: ``|G_small|^2``, (layers,), the mean over the small batches.
            big_sq: ``|G_big|^2``, (layers,).
            small: Samples in a small batch.
            big: Samples in a big batch.

        Raises:
            ValueError: If the big batch is no larger.
        """
        if not 0 < small < big:
            raise ValueError(f"Expected a big batch larger than the small one. Got {big:g} and {small:g} samples.")
        self.signal += (big * big_sq - small * small_sq) / (big - small)
        self.noise += (small_sq - big_sq) / (1 / small - 1 / big)

    def compute(self) -> Tensor:
        """The noise scales, (layers,), or () of one; below 0 where the signal is lost in the noise."""
        return (self.noise / self.signal).squeeze()

    def signal_fraction(self, batch: float) -> Tensor:
        """``rho`` of a gradient over so many samples, what `NAMO`'s readings estimate, (layers,) or ()."""
        return 1 / (1 + self.compute() / batch)
