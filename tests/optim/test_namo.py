"""NAMO and NAMO-D: their rules, and what only they have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_namo import NAMO, NAMOD
from tests import reference
from tests.helpers.optimizers import exact_run, parameter, parameters, randn, refused, run
from tests.helpers.toy import assert_same
from tests.helpers.trajectories import assert_trajectories_agree, exact, muon_hyper, package, problems

namo_hyper = muon_hyper | {
    "mu2": st.floats(0.95, 0.999),
    "eps": st.sampled_from([0.0, 1e-8, 1e-2]),
    "shape_scale": st.sampled_from([0.2, 0.5, None]),
    "max_step": st.sampled_from([1.0, 0.05, None]),
    "decay": st.sampled_from(["adaptive", "lr"]),
}


adaptive_optimizers = pytest.mark.parametrize("cls", [NAMO, NAMOD])


def test_transposing_matters_to_namo_d_whose_statistics_are_by_column():
    start, gradients = randn(4, 7, dtype=torch.float64), [[randn(4, 7, seed=s, dtype=torch.float64)] for s in (1, 2, 3)]
    plain, transposed = (
        exact_run(NAMOD, [{"params": [nn.Parameter(start.clone())], "transposed": t}], gradients)[0]
        for t in (False, True)
    )
    assert (plain - transposed).abs().max() > 1e-3


def test_fusing_matters():
    start, *gradients = (randn(12, 5, seed=s, dtype=torch.float64) for s in range(4))
    whole, fused = (
        exact_run(NAMO, [{"params": [nn.Parameter(start.clone())], "blocks": k}], [[g] for g in gradients])[0]
        for k in (1, 3)
    )
    assert (whole - fused).abs().max() > 1e-3


@adaptive_optimizers
@pytest.mark.parametrize(("momentum", "beta2"), [(0.95, 0.9), (0.9, 0.81), (0.5, 0.25), (0.5, 0.0)])
def test_a_momentum_that_outlives_the_second_moment_is_refused(cls, momentum, beta2):
    with refused(r"expected beta2 to be above momentum\^2"):
        cls([parameter(3, 3)], momentum=momentum, beta2=beta2)


@adaptive_optimizers
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99])
def test_no_momentum_goes_with_any_second_moment(cls, beta2):
    optimizer = run(cls([parameter(3, 3)], momentum=0.0, beta2=beta2), 0)
    assert not torch.equal(parameters(optimizer)[0], parameter(3, 3))


def test_a_clamp_of_none_or_zero_is_off():
    start = randn(6, 4)
    start_grads = [randn(6, 4, seed=s) * torch.tensor([1e-3, 1, 1, 1e3]) for s in (1, 2)]
    weights = {}
    for clamp in (None, 0, 0.9):
        p = nn.Parameter(start.clone())
        optimizer = NAMOD([p], clamp=clamp)
        for grad in start_grads:
            p.grad = grad.clone()
            optimizer.step()
        weights[clamp] = p.detach()
    assert_same(weights[None], weights[0])
    assert not torch.equal(weights[None], weights[0.9])


@exact
@given(problems, st.fixed_dictionaries(namo_hyper))
def test_namo_is_algorithm_1(problem, hyper):
    assert_trajectories_agree(package(NAMO, *problem, **hyper), reference.namo(*problem, **hyper))


@exact
@given(problems, st.fixed_dictionaries(namo_hyper | {"c": st.sampled_from([0.0, 0.01, 0.1, 0.75, 1.0])}))
def test_namo_d_is_algorithm_2(problem, hyper):
    assert_trajectories_agree(package(NAMOD, *problem, **hyper), reference.namo_d(*problem, **hyper))
