"""Muon and AdaMuon: their rules, against oracles that share no code with them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_namo import NAMO, AdaMuon, Muon
from tests import reference
from tests.helpers.iteration import iterating_in
from tests.helpers.toy import assert_same
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


# --- orders of momentum ---------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "own"), [("pre", "post"), ("post", "pre"), ("none", "post")])
def test_a_checkpoint_goes_on_in_its_own_order_only(saved, own):
    def build(order):
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
        optimizer = Muon([p], order=order)
        optimizer.step()
        return optimizer

    state_dict = build(saved).state_dict()
    assert ("order" in state_dict["param_groups"][0]) == (saved != "pre")  # as in versions that had one order
    build(saved).load_state_dict(copy.deepcopy(state_dict))
    optimizer = build(own)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    words = f"Expected a checkpoint with order={own} .* but it has order='{saved}'"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state_dict)
    assert_same(optimizer.state_dict()["state"], before)


def test_an_average_of_polar_factors_takes_over_no_momentum_and_gives_none_away():
    def build(cls, **hyper):
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
        optimizer = cls([("w", p)], **hyper)
        optimizer.step()
        return optimizer

    post, other = build(Muon, order="post"), build(NAMO)
    post.adopt_state = other.adopt_state = True
    with pytest.raises(ValueError, match="Expected Muon to average gradients"):
        post.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="Taken over: the momentum of 0 matrices"):
        other.load_state_dict(post.state_dict())
    assert not any(value.any() for value in next(iter(other.state.values())).values())
