"""Gradients too large for the iteration are skipped and counted; up to there the step is the reference's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon
from tests import reference

OPTIMIZERS: dict[type, Callable[..., object]] = {
    NAMO: reference.namo,
    NAMOD: reference.namo_d,
    Muon: reference.muon,
    AdaMuon: reference.adamuon,
}
both_iterations = pytest.mark.parametrize("orthogonalizer", ["newton_schulz", "svd"])
all_optimizers = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def take(cls: type, scales: list[float], dtype: torch.dtype, orthogonalizer: str) -> tuple[list[Tensor], int]:
    """The weights before and after each step, with gradients of the given scales; and how many were left out."""
    weight = nn.Parameter(randn(5, 3, seed=1).to(dtype))
    optimizer = cls([weight], lr=0.02, orthogonalizer=orthogonalizer)
    found = [weight.detach().clone()]
    for step, scale in enumerate(scales):
        weight.grad = (scale * randn(5, 3, seed=10 + step)).to(dtype)
        optimizer.step()
        found.append(weight.detach().clone())
    return found, optimizer.skipped_steps()


@all_optimizers
@both_iterations
@pytest.mark.parametrize("scale", [1e15, 1e18, 1e20, 1e40, 1e120, 1e160, 1e300])
def test_a_large_float64_gradient_is_served_or_skipped_and_counted(
    cls: type, orthogonalizer: str, scale: float
) -> None:
    served = scale < 1e19 if orthogonalizer == "newton_schulz" else scale < 1e150
    (before, first, last), skipped = take(cls, [scale, 1.0 * scale if served else 1.0], torch.float64, orthogonalizer)
    assert skipped == (not served)
    assert torch.equal(before, first) != served
    assert last.isfinite().all()
    if served:
        gradients = [scale * randn(5, 3, seed=10 + step) for step in range(2)]
        orth = {"svd": reference.polar, "newton_schulz": reference.newton_schulz}[orthogonalizer]
        expected = list(OPTIMIZERS[cls](before, gradients, eta=0.02, orth=orth))  # type: ignore[call-overload]
        atol = 1e-9 if orthogonalizer == "svd" else 3e-3  # what the bfloat16 iteration rounds at a step of 0.02
        torch.testing.assert_close([first, last], expected, rtol=0, atol=atol)


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e18, 1e20, 1e37])
def test_the_bound_is_the_same_for_narrower_weights(cls: type, dtype: torch.dtype, scale: float) -> None:
    found, skipped = take(cls, [scale, scale], dtype, "newton_schulz")
    assert skipped == (2 if scale > 1e19 else 0)
    for before, after in pairwise(found):
        assert torch.equal(before, after) == (scale > 1e19)
        assert after.isfinite().all()
