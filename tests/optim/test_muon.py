"""Muon and AdaMuon: their rules, against oracles that share no code with them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_namo import AdaMuon, Muon
from tests import reference
from tests.helpers.iteration import iterating_in
from tests.helpers.trajectories import (
    CONVERGENT,
    QUINTIC,
    assert_trajectories_agree,
    exact,
    muon_hyper,
    package,
    problem,
    problems,
)
from tests.reference import drive


@exact
@given(problems, st.fixed_dictionaries(muon_hyper | {"shape_scale": st.sampled_from([0.2, 0.5, None])}))
def test_muon_is_its_rule(problem, hyper):
    assert_trajectories_agree(package(Muon, *problem, **hyper), reference.muon(*problem, **hyper))


# Where a polar factor is zero it is rounding noise, which U = O / (sqrt(V) + eps) lifts to 1e-16 / eps.
@exact
@given(
    problems,
    st.fixed_dictionaries(
        muon_hyper
        | {
            "beta": st.floats(0.5, 0.99),
            "eps": st.sampled_from([1e-4, 1e-2]),
            "shape_scale": st.sampled_from([0.2, 1.0]),
        }
    ),
)
def test_adamuon_is_its_rule(problem, hyper):
    assert_trajectories_agree(package(AdaMuon, *problem, **hyper), reference.adamuon(*problem, **hyper))


@pytest.mark.parametrize(("polynomial", "tolerance"), [(QUINTIC, 5e-2), (CONVERGENT, 2e-2)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (96, 32), (32, 128), (9, 1), (1, 1)])
def test_muon_takes_the_steps_of_torch_optim_muon(shape, nesterov, polynomial, tolerance):
    """In bfloat16, as torch's does: of a 1 x 1 matrix that is 11% off the quintic, which float32 is not."""
    hyper = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, **polynomial}
    W, gradients = problem(*shape, dtype=torch.float32)
    with iterating_in("bfloat16"):
        ours = torch.stack([W, *drive(Muon, W, gradients, **hyper)])
    theirs = torch.stack([W, *drive(torch.optim.Muon, W, gradients, adjust_lr_fn="match_rms_adamw", **hyper)])
    for actual, expected in zip(ours.diff(dim=0), theirs.diff(dim=0), strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()
