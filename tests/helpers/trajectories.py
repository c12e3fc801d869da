"""Trajectories of the optimizers beside those of reference.py."""

from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon
from tests import reference
from tests.reference import drive

RULES = {NAMO: reference.namo, NAMOD: reference.namo_d, Muon: reference.muon, AdaMuon: reference.adamuon}
OURS = {"eta": "lr", "lam": "weight_decay", "mu1": "momentum", "mu2": "beta2", "beta": "beta2", "c": "clamp"}
exact = settings(max_examples=40, deadline=None, derandomize=True)


def problem(m, n, steps=5, *, seed=0, dtype=torch.float64):
    """A weight, and gradients whose columns have magnitudes from 0.1 to 10, other ones at each step."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(m, n).to(dtype), [(draw(m, n) * 10 ** draw(n).clamp(-1, 1)).to(dtype) for _ in range(steps)]


def assert_trajectories_agree(actual, expected, tolerance=1e-10):
    for t, (ours, paper) in enumerate(zip(actual, expected, strict=True), start=1):
        error = (ours - paper).norm() / paper.norm()
        assert error <= tolerance, f"step {t}: {error:.1e}"


def package(cls, W, gradients, **hyper):
    """The package's weights, with the hyper-parameters by the papers' names and an exact polar factor."""
    ours = {OURS.get(name, name): value for name, value in hyper.items()}
    return drive(cls, W, gradients, orthogonalizer="svd", **ours)


problems = st.builds(problem, st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), seed=st.integers(0, 2**20))
muon_hyper = {
    "eta": st.floats(1e-4, 1.0),
    "lam": st.floats(0.0, 0.9),
    "mu1": st.floats(0.0, 0.97),
    "nesterov": st.booleans(),
}
QUINTIC = {"ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5}  # lifts the rounding of its products
CONVERGENT = {"ns_coefficients": (1.875, -1.25, 0.375), "ns_steps": 15}  # a fixed point at 1: forgets its rounding
