"""Matrices of given spectra, and the plain iteration's polynomials, for the tests of polar."""

import pytest
import torch

from tests.helpers.iteration import ITERATIONS
from tests.reference import POLAR_EXPRESS, QUINTIC

POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=ITERATIONS)
# long / short = 1 ... 4; from 64 and 1.5 on steps go by way of the Gram square
SHAPES = [(64, 64), (128, 128), (32, 64), (128, 64), (48, 144), (192, 48), (64, 256), (256, 64)]


def large(*shapes):
    return [pytest.param(shape, marks=pytest.mark.slow) for shape in shapes]


def matrix(m, n, singular=None, *, seed=0, dtype=torch.float32):
    """A matrix of these singular values between random bases; without them a Gaussian one."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(k, min(m, n), generator=generator, dtype=torch.float64) for k in (m, n))
    if singular is None:
        return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)
    return (torch.linalg.qr(U).Q * singular @ torch.linalg.qr(V).Q.T).to(dtype)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# By dtype: 2^k times elements of about 1 is a matrix whose squared norm overflows, but for float16; and one that is far
# from it, beside whose norm 1e-7 is nothing.
LARGE = {torch.float16: (14, 10), torch.bfloat16: (120, 40), torch.float32: (120, 40), torch.float64: (1000, 40)}


def of_exponent(shape, exponent, dtype, seed=0):
    """Numbers of float16's precision at most, so that every dtype has them."""
    return matrix(*shape, seed=seed).clamp(-2, 2).to(torch.bfloat16).to(torch.float64).mul(2.0**exponent).to(dtype)
