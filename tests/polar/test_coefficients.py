"""The polynomials of the iteration: published ones, one's own, and what is refused."""

import pytest
import torch

from lightning_namo import orthogonalize
from tests.helpers.matrices import POLYNOMIALS, matrix, relative
from tests.reference import newton_schulz

RANGES = {"quintic": (0.68, 1.205), "polar_express": (0.86, 1.14)}  # of outputs, where inputs are >= 0.003


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_ns_steps_stops_after_that_many_polynomials(coefficients, shape, steps):
    X = matrix(*shape, dtype=torch.float64)
    Q = orthogonalize(X, ns_steps=steps, ns_coefficients=coefficients, dtype=torch.float64)
    assert relative(Q, newton_schulz(X, POLYNOMIALS[coefficients][:steps], torch.float64)) < 1e-10


@pytest.mark.parametrize(
    "triples", [[(1.5, -0.5, 0.0)] * 3, ((3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375))]
)
def test_coefficients_of_ones_own_are_taken_in_their_order(triples):
    X = matrix(24, 40, dtype=torch.float64)
    Q = orthogonalize(X, ns_steps=3, ns_coefficients=triples, dtype=torch.float64)
    assert relative(Q, newton_schulz(X, triples, torch.float64)) < 1e-10


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_singular_values_land_in_the_published_range(coefficients, shape, dtype, slack):
    spectrum = torch.logspace(0, -2, 64, dtype=torch.float64)
    spectrum[-1] = 0.003 * spectrum.norm()
    singular = torch.linalg.svdvals(
        orthogonalize(matrix(*shape, spectrum), ns_coefficients=coefficients, dtype=dtype).double()
    )
    low, high = RANGES[coefficients]
    assert low - slack <= singular.min()
    assert singular.max() <= high + slack
