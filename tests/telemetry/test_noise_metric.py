"""The gradient noise scale as a metric: known gradients, and ranks that sync."""

from __future__ import annotations

import pytest
import torch

from lightning_namo.telemetry.noise_metric import GradientNoiseScale
from tests.helpers.launch import run_ranks

ELEMENTS = 400


def update(metric: GradientNoiseScale, generator: torch.Generator, small: int, parts: int) -> None:
    """Two layers of unit signal whose samples have noise of trace 50 and 5."""
    trace = torch.tensor([50.0, 5.0]).view(1, 2, 1)
    noise = torch.randn(parts, 2, ELEMENTS, generator=generator) * (trace / ELEMENTS / small).sqrt()
    grads = noise + ELEMENTS**-0.5
    metric.update(grads.square().sum(dim=2).mean(dim=0), grads.mean(dim=0).square().sum(dim=1), small, small * parts)


def test_it_measures_a_known_noise() -> None:
    metric, generator = GradientNoiseScale(layers=2), torch.Generator().manual_seed(0)
    for _ in range(200):
        update(metric, generator, small=4, parts=8)
    torch.testing.assert_close(metric.compute(), torch.tensor([50.0, 5.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(
        metric.signal_fraction(batch=16), 1 / (1 + torch.tensor([50.0, 5.0]) / 16), rtol=0.05, atol=0
    )
    metric.reset()
    assert not metric.signal.any()


def on_rank(rank: int) -> torch.Tensor:
    metric = GradientNoiseScale(layers=2)
    for seed in range(rank, 5, 2):
        update(metric, torch.Generator().manual_seed(seed), small=4, parts=8)
    return torch.stack((metric.signal_fraction(batch=16), metric.compute()))


def test_ranks_sync() -> None:
    metric = GradientNoiseScale(layers=2)
    for seed in range(5):
        update(metric, torch.Generator().manual_seed(seed), small=4, parts=8)
    for found in run_ranks(on_rank, 2):
        torch.testing.assert_close(found, torch.stack((metric.signal_fraction(batch=16), metric.compute())))


def test_batches_of_one_size_say_nothing() -> None:
    with pytest.raises(ValueError, match="larger than the small one"):
        GradientNoiseScale().update(torch.ones(1), torch.ones(1), small=4, big=4)
