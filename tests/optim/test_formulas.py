"""All four optimizers against an oracle that shares no code with them: reference.py."""

from functools import partial

import pytest
import torch

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon
from tests import reference
from tests.helpers.trajectories import CONVERGENT, QUINTIC, RULES, assert_trajectories_agree, package, problem
from tests.reference import PAPER, drive

# One row of the table paper against code, or another choice, at a time: lr large enough for the caps to bind.
SWITCHES = [
    (NAMO, {"nesterov": False}),
    (NAMO, {"shape_scale": None}),
    (NAMO, {"shape_scale": 0.4}),
    (NAMO, {"max_step": None}),
    (NAMO, {"max_step": 0.5}),
    (NAMO, {"decay": "lr"}),
    (NAMO, {"lam": 0.01}),
    (NAMO, {"lam": 1.5, "max_step": None}),
    (NAMO, {"mu1": 0.9}),
    (NAMO, {"mu2": 0.95}),
    (NAMO, {"eps": 0.1}),
    (NAMO, PAPER),
    (NAMOD, {"nesterov": False}),
    (NAMOD, {"shape_scale": None}),
    (NAMOD, {"max_step": None}),
    (NAMOD, {"max_step": 0.5}),
    (NAMOD, {"decay": "lr"}),
    (NAMOD, {"lam": 1.5, "max_step": None}),
    (NAMOD, {"decay": "lr", "lam": 1.5}),  # beyond the floor at 0
    (NAMOD, {"c": 0.9}),
    (NAMOD, {"c": 0.0}),
    (NAMOD, {"eps": 0.1}),
    (NAMOD, PAPER | {"lam": 0.01, "c": 0.1}),
    (Muon, {"nesterov": False}),
    (Muon, {"shape_scale": None}),
    (Muon, {"lam": 0.01}),
    (Muon, {"order": "none"}),
    (Muon, {"order": "post"}),
    (Muon, {"order": "post", "nesterov": False}),
    (AdaMuon, {"nesterov": False}),
    (AdaMuon, {"beta": 0.9}),
    (AdaMuon, {"eps": 0.1}),
    (AdaMuon, {"shape_scale": 0.4}),
]


@pytest.mark.parametrize(("cls", "switch"), SWITCHES)
def test_every_argument_is_reached_and_changes_the_trajectory(cls, switch):
    hyper = {"eta": 0.9, "eps": 1e-8, "c": 0.8}
    hyper = {name: hyper[name] for name in hyper if name in reference_arguments(cls)}
    W, gradients = problem(6, 4)
    *_, default = package(cls, W, gradients, **hyper)
    *_, switched = package(cls, W, gradients, **hyper | switch)
    assert (default - switched).norm() > 1e-4 * default.norm()
    assert_trajectories_agree(package(cls, W, gradients, **hyper | switch), RULES[cls](W, gradients, **hyper | switch))


def reference_arguments(cls):
    return RULES[cls].__kwdefaults__.keys() | {"eta"}


@pytest.mark.parametrize("cls", RULES)
def test_defaults_are_the_official_code(cls):
    W, gradients = problem(6, 4)
    clamp = {"c": 0.1} if cls is NAMOD else {}
    assert_trajectories_agree(
        drive(cls, W, gradients, lr=0.01, orthogonalizer="svd"), RULES[cls](W, gradients, eta=0.01, **clamp)
    )


@pytest.mark.parametrize("cls", RULES)
def test_a_learning_rate_schedule_leaves_the_statistics_alone(cls):
    """Three steps at lr 0 move momentum and v, not the weight: the fourth is that of a constant lr."""
    W, gradients = problem(6, 4, steps=4)
    param = torch.nn.Parameter(W.clone())
    optimizer = cls([param], lr=0.0, weight_decay=0.0, orthogonalizer="svd")
    for G in gradients:
        optimizer.param_groups[0]["lr"] = 0.01 if G is gradients[-1] else 0.0
        param.grad = G.clone()
        optimizer.step()
    *_, before, after = RULES[cls](W, gradients, eta=0.01, lam=0.0, **({"c": 0.1} if cls is NAMOD else {}))
    torch.testing.assert_close(param.detach() - W, after - before, rtol=1e-10, atol=1e-12)


# --- how a matrix lies in its parameter -----------------------------------------------------------


@pytest.mark.parametrize("cls", RULES)
def test_a_transposed_parameter_follows_its_matrix(cls):
    W, gradients = problem(6, 4)
    group = partial(one_group, cls, transposed=True)
    stored = drive(group, W.T.contiguous(), [G.T.contiguous() for G in gradients])
    assert_trajectories_agree([W.T for W in stored], RULES[cls](W, gradients, eta=0.01))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("blocks", "rows"), [(3, [4, 4, 4]), ([6, 3, 3], [6, 3, 3])])
@pytest.mark.parametrize("cls", RULES)
def test_blocks_of_rows_are_matrices_of_their_own(cls, blocks, rows, transposed):
    W, gradients = problem(12, 5)
    expected = [
        RULES[cls](block, [G.split(rows)[i] for G in gradients], eta=0.01) for i, block in enumerate(W.split(rows))
    ]
    group = partial(one_group, cls, blocks=blocks, transposed=transposed)
    if transposed:
        actual = (W.T for W in drive(group, W.T.contiguous(), [G.T.contiguous() for G in gradients]))
    else:
        actual = drive(group, W, gradients)
    assert_trajectories_agree(actual, map(torch.cat, zip(*expected, strict=True)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cls", RULES)
def test_a_convolution_is_flattened_from_its_second_dimension(cls, memory_format):
    W, gradients = problem(8, 12)
    as_conv = [x.view(8, 3, 2, 2).contiguous(memory_format=memory_format) for x in [W, *gradients]]
    actual = drive(partial(one_group, cls), as_conv[0], as_conv[1:])
    assert_trajectories_agree((W.flatten(1) for W in actual), RULES[cls](W, gradients, eta=0.01))


def one_group(cls, params, **group):
    clamp = {"clamp": reference.namo_d.__kwdefaults__["c"]} if cls is NAMOD else {}
    return cls([{"params": params, **group}], lr=0.01, orthogonalizer="svd", **clamp)


@pytest.mark.usefixtures("iteration")
def test_a_bfloat16_weight_is_rounded_once_a_step():
    """Weights in [1, 2), where neighbours are 2^-7 apart: half of that, and a little for O in bfloat16."""
    W, G = (1 + torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    (actual,) = drive(NAMO, W, [G], lr=0.01, weight_decay=0.3)
    orth = partial(reference.newton_schulz, dtype=torch.float64)
    (expected,) = reference.namo(W.double(), [G.double()], eta=0.01, lam=0.3, orth=orth)
    assert (actual - expected).abs().max() < 0.55 * 2**-7


# --- by Newton-Schulz -----------------------------------------------------------------------------


def as_sent(polynomial, N):
    """The polynomial in float64, of a matrix and to a result that are sent in bfloat16."""
    polynomials = [polynomial["ns_coefficients"]] * polynomial["ns_steps"]
    return reference.newton_schulz(N.bfloat16().double(), polynomials, torch.float64).bfloat16().double()


# Single steps. In float32 there is the rounding of what is sent and little else (an element may round to the other
# side: up to 1.1e-3). In bfloat16 there is the iteration's own. Of a 1 x 1 matrix it is that of one number, 0.13; and
# AdaMuon's first step is the sign of the polar factor, of which elements near 0 may have the other one: 0.125.
@pytest.mark.parametrize("polynomial", [QUINTIC, CONVERGENT], ids=["quintic", "convergent"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (96, 32), (32, 128), (9, 1), (1, 1)])
@pytest.mark.parametrize("cls", RULES)
def test_steps_by_newton_schulz_are_those_of_its_polynomial(cls, shape, polynomial, iteration):
    W, gradients = problem(*shape, dtype=torch.float32)
    actual = torch.stack([W, *drive(cls, W, gradients, lr=0.01, **polynomial)])
    steps = RULES[cls](W.double(), [G.double() for G in gradients], eta=0.01, orth=partial(as_sent, polynomial))
    expected = torch.stack([W, *steps])
    tolerance = 2e-3 if iteration == "float32" else 0.15 if shape == (1, 1) or cls is AdaMuon else 5e-2
    for ours, wanted in zip(actual.diff(dim=0), expected.diff(dim=0), strict=True):
        assert (ours - wanted).norm() <= tolerance * wanted.norm()
