"""Numbers of whole matrices, against numpy's SVD and against spectra that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_namo.telemetry.spectra import (
    QUANTILES,
    Decomposition,
    Measured,
    Spectra,
    nuclear_norm,
    orthogonality_error,
    subspace_error,
)
from tests.helpers.matrices import matrix

SHAPES = [(24, 24), (12, 40), (40, 12), (1, 9)]


def known(shape: tuple[int, int]) -> torch.Tensor:
    """Singular values from 1 down to 0.001."""
    return torch.logspace(0, -3, min(shape), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_vectors_and_polar_factor_are_numpy_s(shape: tuple[int, int]) -> None:
    X = matrix(*shape, known(shape)).float()
    U, values, Vh = np.linalg.svd(X.double().numpy(), full_matrices=False)
    found = Decomposition(X)
    np.testing.assert_allclose(found.values.numpy(), values, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.polar().numpy(), U @ Vh, atol=1e-6)
    assert float(nuclear_norm(X)) == pytest.approx(values.sum(), rel=1e-6)
    if (leading := found.leading(5)) is None:
        assert min(shape) <= 5
        return
    left, right = leading
    assert float(subspace_error(left, torch.tensor(U[:, :5]))) < 1e-6
    assert float(subspace_error(right, torch.tensor(Vh[:5].T))) < 1e-6


def test_a_matrix_of_low_rank_has_zeros_and_directions_for_the_others_only() -> None:
    found = Decomposition(matrix(20, 30, torch.tensor([3.0, 2.0, 1.0] + [0.0] * 17, dtype=torch.float64)))
    assert found.values[3:].eq(0).all()
    polar = found.polar()
    assert float((polar @ polar.mT).trace()) == pytest.approx(3)
    within, beyond = found.leading(3), found.leading(4)
    assert within is not None
    assert beyond is not None
    assert all(side.isfinite().all() for side in within)
    assert all(side.isnan().all() for side in beyond)
    assert subspace_error(within[0], torch.full_like(within[0], math.nan)).isnan()
    nothing = Decomposition(torch.zeros(4, 6))
    assert nothing.values.eq(0).all()
    assert nothing.polar().eq(0).all()


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.3, math.pi / 2])
def test_subspaces_differ_by_the_sine_of_their_largest_angle(angle: float) -> None:
    basis = torch.eye(6, dtype=torch.float64)
    turned = basis[:, :3].clone()
    turned[:, 2] = math.cos(angle) * basis[:, 2] + math.sin(angle) * basis[:, 4]
    mixed = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q  # another basis of the same subspace
    assert float(subspace_error(basis[:, :3] @ mixed, turned)) == pytest.approx(math.sin(angle), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_orthogonality_error_is_that_of_the_shorter_side(shape: tuple[int, int]) -> None:
    values = torch.tensor([1.2, 1.1, 1.0, 0.9, 0.8, 0.5], dtype=torch.float64)
    O = matrix(*shape, values)
    expected = float((values.square() - 1).norm()) / math.sqrt(6)
    assert float(orthogonality_error(O.float())) == pytest.approx(expected, rel=1e-6)
    assert orthogonality_error(0 * O).isnan()


def test_numbers_follow_from_the_singular_values() -> None:
    gradient = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.001], dtype=np.float32)
    momentum = np.array([6.0, 3.0, 0.5, 0.2, 0.02, 0.01], dtype=np.float32)
    found = Spectra(gradient, momentum, Measured(alignment_momentum=0.5), rank=2).numbers()
    for name, values in {"gradient": gradient, "momentum": momentum}.items():
        for q in QUANTILES:
            assert found[f"sigma_{name}_q{q}"] == pytest.approx(np.percentile(values, q))
        norm = np.linalg.norm(values)
        assert found[f"stable_rank_{name}"] == pytest.approx(norm**2 / values[0] ** 2)
    assert found["spectral_gap_gradient"] == pytest.approx(2.0)
    assert found["spectral_gap_momentum"] == pytest.approx(2.5)
    assert found["unlifted_share_gradient"] == pytest.approx(1 / 6)  # below 0.003 * 9.2
    assert found["unlifted_share_momentum"] == pytest.approx(2 / 6)  # below 0.003 * 6.7 = 0.0202
    ratios = [found[f"filter_ratio_{k}"] for k in ("top", "rank", "middle")]
    assert ratios == pytest.approx([6 / 8, 3 / 4, 0.2 / 1])
    assert found["alignment_momentum"] == 0.5
    assert not found.keys() & {"alignment_gradient", "orthogonality_error"}


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_numbers_do_not_depend_on_the_scale(scale: float) -> None:
    values = np.array([8.0, 4.0, 2.0, 0.02], dtype=np.float32)
    one, scaled = (Spectra(v, v, Measured(), rank=2) for v in (values, values * np.float32(scale)))
    for key, value in one.numbers().items():
        is_length = key.startswith(("sigma", "spectral_gap"))
        assert scaled.numbers()[key] == pytest.approx(value * (scale if is_length else 1), rel=1e-4), key
    np.testing.assert_allclose(scaled.relative("gradient"), one.relative("gradient"), rtol=1e-4)


def test_what_is_not_known_is_left_out() -> None:
    values, nothing = np.array([2.0, 1.0], dtype=np.float32), np.full(2, np.nan, dtype=np.float32)
    no_momentum = Spectra(values, nothing, Measured(), rank=1).numbers()
    assert {name.partition("_")[0] for name in no_momentum} == {"sigma", "stable", "unlifted", "spectral"}
    assert all("momentum" not in name for name in no_momentum)
    other_units = Spectra(values, values, Measured(), rank=1, averages_gradients=False).numbers()
    assert not any(name.startswith("filter_ratio") for name in other_units)
    assert "sigma_momentum_q50" in other_units
    small = Spectra(values, values, Measured(), rank=2).numbers()
    assert not any(name.startswith("spectral_gap") for name in small)
    assert Spectra(nothing, nothing, Measured(), rank=1).numbers() == {}
    assert len(Spectra(nothing, values, Measured(), rank=1).relative("gradient")) == 0


def test_histograms_are_of_logarithms_over_the_norm() -> None:
    spectra = Spectra(np.array([3.0, 4.0, 0.0], dtype=np.float32), np.ones(3, dtype=np.float32), Measured(), rank=1)
    np.testing.assert_allclose(spectra.relative("gradient"), np.log10([0.6, 0.8]), rtol=1e-6)
