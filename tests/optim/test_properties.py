"""What the papers prove or imply, seen through the optimizers: exact polar factor, float64, eps = 0.

With UNIT, the paper's box at lr 1, a step is W - alpha O (NAMO) or W - O D (NAMO-D), so the step sizes can be
read off the updates: alpha is an update's spectral norm, d_j the norm of its column j if the matrix is tall.
"""

from functools import partial
from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon
from tests.helpers.rules import BUILT_IN
from tests.reference import drive, polar

EXACT = {"orthogonalizer": "svd", "eps": 0.0}
PAPER = EXACT | {"nesterov": False, "shape_scale": None, "max_step": None}
UNIT = PAPER | {"lr": 1.0, "weight_decay": 0.0}

some = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
momenta = st.floats(0.0, 0.97)
beta2s = st.floats(0.95, 0.999)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gradients(steps, m, n, seed, spread=1.0):
    """Gradients, and columns of them, whose magnitudes differ by about 10^spread."""
    scales = 10 ** (spread * randn(steps, 1, n, seed=seed + 1).clamp(-1, 1))
    return randn(steps, m, n, seed=seed) * scales


def polar_of_random(m, n, seed=0):
    return polar(randn(m, n, seed=seed))


def run(cls, gradients, W=None, **hyper):
    """(steps + 1, m, n): the weights from W (default 0) on."""
    W = torch.zeros_like(gradients[0]) if W is None else W
    return torch.stack([W, *drive(cls, W, gradients, **hyper)])


def alphas(gradients, **hyper):
    """(steps,): NAMO's step sizes."""
    return torch.linalg.matrix_norm(run(NAMO, gradients, **UNIT | hyper).diff(dim=0), ord=2)


def column_step_sizes(gradients, **hyper):
    """(steps, n): NAMO-D's step sizes, for m >= n."""
    return run(NAMOD, gradients, **UNIT | {"clamp": None} | hyper).diff(dim=0).norm(dim=1)


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


# --- 1, 2, 3: the adaptive step size --------------------------------------------------------------


def alpha_bound(t, mu1, mu2):
    q = mu1**2 / mu2
    correction = sqrt(1 - mu2**t) / (1 - mu1**t)
    return correction * (1 - mu1) / sqrt(1 - mu2) * sqrt((1 - q**t) / (1 - q))


def worst_gradients(t, mu1, mu2, m=4, n=3):
    """One direction, its size the ratio of the two averages' weights at step t."""
    return torch.tensor([(mu1 / mu2) ** (t - tau) for tau in range(1, t + 1)]).view(t, 1, 1) * randn(m, n)


@some
@given(seeds, st.integers(1, 12), momenta, beta2s, st.floats(0.0, 3.0))
def test_step_sizes_never_exceed_their_bound(seed, steps, mu1, mu2, spread):
    gradients = random_gradients(steps, 4, 3, seed, spread)
    bounds = torch.tensor([alpha_bound(t, mu1, mu2) for t in range(1, steps + 1)], dtype=torch.float64)
    hyper = {"momentum": mu1, "beta2": mu2}
    assert (alphas(gradients, **hyper) <= bounds * (1 + 1e-9)).all()
    assert (column_step_sizes(gradients, **hyper) <= bounds[:, None] * (1 + 1e-9)).all()


@pytest.mark.parametrize(("mu1", "mu2"), [(0.95, 0.99), (0.9, 0.999), (0.5, 0.3)])
@pytest.mark.parametrize("t", [1, 2, 5, 30])
def test_step_sizes_reach_their_bound_where_the_two_averages_weigh_alike(t, mu1, mu2):
    gradients, hyper = worst_gradients(t, mu1, mu2), {"momentum": mu1, "beta2": mu2}
    bound = torch.tensor(alpha_bound(t, mu1, mu2), dtype=torch.float64)
    assert_close(alphas(gradients, **hyper)[-1], bound)
    assert_close(column_step_sizes(gradients, **hyper)[-1], bound.expand(3))


def test_the_largest_step_size_climbs_from_1_to_1_68():
    assert alphas(worst_gradients(1, 0.95, 0.99))[-1].item() == pytest.approx(1.0)
    assert alphas(worst_gradients(1000, 0.95, 0.99))[-1].item() == pytest.approx(1.6818, abs=1e-4)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("cls", [NAMO, NAMOD])
def test_averages_that_leave_the_step_size_without_a_bound_are_refused(cls, beta2):
    with pytest.raises(ValueError, match="beta2"):
        cls([torch.nn.Parameter(randn(4, 3))], momentum=0.95, beta2=beta2)


@pytest.mark.parametrize(("nesterov", "first"), [(False, 1.0), (True, 1.95)])
def test_the_first_step_size_is_one_and_1_plus_momentum_with_nesterov(nesterov, first):
    gradient = randn(1, 5, 3)
    assert alphas(gradient, nesterov=nesterov).item() == pytest.approx(first)
    assert column_step_sizes(gradient, nesterov=nesterov).tolist() == [pytest.approx([first] * 3)]


def test_nesterov_under_a_constant_gradient_starts_at_1_95_and_1_46_and_1_30():
    sizes = alphas(randn(4, 3).expand(3, 4, 3), nesterov=True)
    assert sizes.tolist() == pytest.approx([1.95, 1.46, 1.30], abs=5e-3)


@some
@given(seeds, momenta, beta2s, st.floats(0.0, 0.9))
def test_a_constant_gradient_makes_namo_and_namo_d_muon(seed, mu1, mu2, weight_decay):
    gradients, W = randn(4, 3, seed=seed).expand(6, 4, 3), randn(4, 3, seed=seed + 1)
    hyper = {"lr": 0.3, "weight_decay": weight_decay, "momentum": mu1}
    muon = run(Muon, gradients, W, **hyper, nesterov=False, shape_scale=None, orthogonalizer="svd")
    for cls in (NAMO, NAMOD):
        assert_close(run(cls, gradients, W, **PAPER, **hyper, beta2=mu2), muon)


def test_alternating_gradients_shrink_the_step_size_to_its_floor():
    gradients = randn(4, 3) * torch.tensor([1.0, -1.0]).repeat(40).view(80, 1, 1)
    for sizes in (alphas(gradients, momentum=0.6), column_step_sizes(gradients, momentum=0.6)):
        assert_close(sizes[-1], torch.full_like(sizes[-1], 0.4 / 1.6))


@pytest.mark.parametrize(("nesterov", "limit"), [(False, 0.160), (True, 0.174)])
def test_pure_noise_takes_a_sixth_of_muons_step(nesterov, limit):
    assert alphas(randn(300, 24, 24), nesterov=nesterov)[100:].mean().item() == pytest.approx(limit, rel=0.02)


# --- 4, 5: the update -----------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@some
@given(seeds, shapes, st.booleans())
def test_namos_update_over_its_step_size_is_semi_orthogonal(seed, shape, nesterov):
    updates = run(NAMO, random_gradients(4, *shape, seed), **UNIT | {"nesterov": nesterov}).diff(dim=0)
    singular = torch.linalg.svdvals(updates)
    assert_close(singular, singular[:, :1].expand_as(singular))


@some
@given(seeds, shapes, st.floats(0.05, 0.99))
def test_namo_ds_update_has_a_condition_number_of_at_most_one_over_c_squared(seed, shape, c):
    updates = run(NAMOD, random_gradients(4, *shape, seed, spread=2.0), **UNIT | {"clamp": c}).diff(dim=0)
    singular = torch.linalg.svdvals(updates)
    assert (singular[:, 0] <= singular[:, -1] / c**2 * (1 + 1e-9)).all()


def test_namo_ds_clamp_binds_at_c_and_one_over_c_times_the_mean():
    gradients = random_gradients(4, 6, 5, seed=0, spread=2.0)
    free, clamped = column_step_sizes(gradients), column_step_sizes(gradients, clamp=0.8)
    mean = free.mean(dim=1, keepdim=True)
    assert_close(clamped, free.clamp(0.8 * mean, mean / 0.8))
    assert (clamped != free).any()


@some
@given(seeds)
def test_namo_d_with_c_1_takes_the_mean_step_size_for_all_columns(seed):
    gradients = random_gradients(4, 5, 4, seed)
    mean = column_step_sizes(gradients).mean(dim=1)
    singular = torch.linalg.svdvals(run(NAMOD, gradients, **UNIT | {"clamp": 1.0}).diff(dim=0))
    assert_close(singular, mean[:, None].expand_as(singular))


@some
@given(seeds)
def test_namos_step_size_is_the_weighted_mean_square_of_namo_ds(seed):
    gradients = random_gradients(6, 5, 4, seed)
    v = torch.zeros(4, dtype=torch.float64)
    for gradient, alpha, d in zip(gradients, alphas(gradients), column_step_sizes(gradients), strict=True):
        v = 0.99 * v + 0.01 * gradient.square().sum(dim=0)
        assert_close(alpha**2, (v * d**2).sum() / v.sum())


@some
@given(seeds, st.integers(1, 6), st.floats(0.0, 1.0))
def test_namo_d_is_namo_on_a_single_column(seed, m, c):
    gradients, W = random_gradients(5, m, 1, seed), randn(m, 1, seed=seed + 2)
    assert_close(run(NAMOD, gradients, W, **EXACT, clamp=c), run(NAMO, gradients, W, **EXACT))


@some
@given(seeds, shapes)
def test_without_memory_namo_adds_up_polar_factors(seed, shape):
    gradients, W = random_gradients(5, *shape, seed), randn(*shape, seed=seed + 2)
    weights = run(NAMO, gradients, W, **PAPER, lr=0.3, weight_decay=0.0, momentum=0.0, beta2=0.0)
    assert_close(weights[-1], W - 0.3 * sum(map(polar, gradients)))


# --- 6, 7: symmetries -----------------------------------------------------------------------------

ADAPTIVE = {"lr": 0.3, "weight_decay": 0.2}


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e6])
@pytest.mark.parametrize("cls", BUILT_IN)
def test_the_scale_of_the_gradients_leaves_the_trajectory_alone(cls, scale):
    gradients, W = random_gradients(6, 5, 4, seed=0), randn(5, 4, seed=1)
    run_ = partial(run, cls, W=W, **ADAPTIVE, **EXACT if cls is not Muon else {"orthogonalizer": "svd"})
    assert_close(run_(scale * gradients), run_(gradients))


@pytest.mark.parametrize("cls", [NAMO, NAMOD])
def test_eps_is_what_feels_the_scale_of_the_gradients(cls):
    gradients, W = randn(6, 5, 4), randn(5, 4, seed=1)
    weights = run(cls, gradients, W, **ADAPTIVE, orthogonalizer="svd", eps=1e-8)
    scaled = run(cls, 1e-6 * gradients, W, **ADAPTIVE, orthogonalizer="svd", eps=1e-8)
    assert 1e-5 < (scaled - weights)[-1].norm() / weights[-1].norm() < 0.1


def rotate_left(X):
    return polar_of_random(X.size(-2), X.size(-2), seed=7) @ X


def rotate_right(X):
    return X @ polar_of_random(X.size(-1), X.size(-1), seed=8)


def permute_columns(X):
    return X.roll(1, dims=-1)


def transpose(X):
    return X.mT


def commutation_error(cls, symmetry, shape, **hyper):
    gradients, W = random_gradients(5, *shape, seed=0), randn(*shape, seed=5)
    run_ = partial(run, cls, **ADAPTIVE, **EXACT, **hyper)
    here, there = symmetry(run_(gradients, W)), run_(symmetry(gradients), symmetry(W))
    return ((here - there).norm() / here.norm()).item()


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("symmetry", [rotate_left, rotate_right, permute_columns, transpose])
def test_namo_commutes_with_rotations_and_transposition(symmetry, shape):
    assert commutation_error(NAMO, symmetry, shape) < 1e-9


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("symmetry", [rotate_left, permute_columns])
def test_namo_d_commutes_with_left_rotations_and_column_permutations(symmetry, shape):
    assert commutation_error(NAMOD, symmetry, shape) < 1e-9


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
@pytest.mark.parametrize("symmetry", [rotate_right, transpose])
def test_namo_d_feels_right_rotations_and_transposition(symmetry, shape):
    assert commutation_error(NAMOD, symmetry, shape) > 1e-2


# --- 8: boundedness -------------------------------------------------------------------------------


@some
@given(seeds, shapes, st.floats(0.05, 0.4), st.floats(0.5, 2.0), st.floats(0.1, 10.0), st.floats(0.0, 1.0))
def test_adaptive_decay_bounds_the_weight(seed, shape, shrink, growth, weight_decay, noise):
    gradients = randn(*shape, seed=seed) + noise * randn(40, *shape, seed=seed + 1)
    gradients = gradients * (growth ** torch.arange(40.0, dtype=torch.float64)).view(-1, 1, 1)
    W = randn(*shape, seed=seed + 2)
    hyper = EXACT | {"lr": shrink / weight_decay, "weight_decay": weight_decay, "max_step": None}
    limit = 0.2 * sqrt(max(shape)) / weight_decay
    norms = torch.linalg.matrix_norm(run(NAMO, gradients, W, **hyper), ord=2)
    assert (norms <= max(norms[0].item(), limit) * (1 + 1e-9)).all()
    columns = run(NAMOD, gradients, W, **hyper).norm(dim=1)
    assert (columns <= columns[0].clamp(min=limit) * (1 + 1e-9)).all()


def test_the_bound_of_adaptive_decay_is_sharp_and_not_that_of_plain_decay():
    hyper = PAPER | {"lr": 0.5, "weight_decay": 0.5}
    adaptive, plain = (
        torch.linalg.matrix_norm(run(NAMO, worst_gradients(200, 0.95, 0.99), **hyper, decay=decay)[-1], ord=2)
        for decay in ("adaptive", "lr")
    )
    assert adaptive.item() == pytest.approx(1 / 0.5)
    assert plain.item() > 1.3 / 0.5


# --- 9: gradients that carry nothing --------------------------------------------------------------


NOTHING = torch.zeros(3, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("cls", [NAMO, NAMOD])
@pytest.mark.parametrize("orthogonalizer", ["svd", "newton_schulz"])
def test_zero_gradients_from_the_start_change_nothing(cls, eps, orthogonalizer):
    W = randn(4, 3)
    weights = run(cls, NOTHING, W, eps=eps, orthogonalizer=orthogonalizer)
    assert torch.equal(weights, W.expand_as(weights))


@pytest.mark.parametrize("cls", [Muon, partial(AdaMuon, eps=0.0)])
@pytest.mark.parametrize("orthogonalizer", ["svd", "newton_schulz"])
def test_zero_gradients_from_the_start_leave_only_the_decay_of_lr(cls, orthogonalizer):
    W = randn(4, 3)
    weights = run(cls, NOTHING, W, lr=0.1, weight_decay=0.5, orthogonalizer=orthogonalizer)
    assert_close(weights[-1], 0.95**3 * W)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_column_without_gradients_stays_finite(eps):
    gradients = randn(3, 4, 3) * torch.tensor([1.0, 0.0, 1.0])
    weights = run(NAMOD, gradients, randn(4, 3, seed=1), orthogonalizer="svd", eps=eps, clamp=0.5)
    assert weights.isfinite().all()


@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("cls", BUILT_IN)
def test_a_step_with_a_non_finite_gradient_did_not_happen(cls, poison):
    good = random_gradients(5, 4, 3, seed=0)
    bad = torch.randn_like(good[:1])
    bad[0, 1, 2] = poison
    W = randn(4, 3, seed=1)
    clean = run(cls, good, W, orthogonalizer="svd")
    weights = run(cls, torch.cat([good[:2], bad, good[2:]]), W, orthogonalizer="svd")
    assert torch.equal(weights[3], weights[2])
    assert torch.equal(torch.cat([weights[:3], weights[4:]]), clean)


@pytest.mark.parametrize("poison", [nan, inf])
@pytest.mark.parametrize("cls", BUILT_IN)
def test_a_non_finite_gradient_leaves_the_state_alone_and_is_counted(cls, poison):
    param = torch.nn.Parameter(randn(4, 3))
    optimizer = cls([param])
    param.grad = randn(4, 3, seed=1)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[param].items()}
    param.grad = torch.full_like(param, poison)
    optimizer.step()
    after = optimizer.state[param]
    assert after["skipped"].item() == before["skipped"].item() + 1 == 1
    for name in before.keys() - {"skipped"}:
        assert torch.equal(after[name], before[name]), name
