"""FLOPs of the iteration, and where steps go by way of the Gram square."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_namo import orthogonalize
from lightning_namo.polar.cost import newton_schulz_flops
from tests.helpers.matrices import POLYNOMIALS


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(512, 768), (64, 96), (64, 97), (128, 64), (512, 1024), (1100, 520)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_the_flops_are_those_of_the_products(coefficients, shape, steps):
    with FlopCounterMode(display=False) as counted:
        Q = orthogonalize(torch.ones(shape), ns_steps=steps, ns_coefficients=coefficients)
    assert Q.isfinite().all()
    assert counted.get_total_flops() == newton_schulz_flops(shape, steps, coefficients)


def test_the_gram_square_is_taken_where_it_is_cheaper():
    direct = {shape: 10 * shape[0] ** 2 * (2 * shape[1] + shape[0]) for shape in [(64, 96), (64, 97), (32, 320)]}
    assert newton_schulz_flops((64, 96), 5) == direct[64, 96]
    assert newton_schulz_flops((64, 97), 5) < direct[64, 97]
    assert newton_schulz_flops((32, 320), 5) == direct[32, 320]  # too small: no less exact
    assert newton_schulz_flops((768, 3072), 5) == 2 * 768**3 * (4 * 4 + 14)
    assert newton_schulz_flops((768, 3072), 5, "polar_express") == 2 * 768**3 * (6 * 4 + 11)
