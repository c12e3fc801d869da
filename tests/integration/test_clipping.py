"""Gradient clipping on one device, as torch does it."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import GradientClipping, clip_gradients, gradient_norm
from tests.helpers.clipping import BOUND, bits, gradients
from tests.helpers.toy import assert_same


def layer_with(*grads: Tensor | None) -> nn.ParameterList:
    """A module of parameters with these gradients; None: a matrix without one."""
    parameters = nn.ParameterList(torch.zeros(2, 2) if g is None else torch.zeros_like(g) for g in grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("bound", [0.1, 5.0, 1000.0, math.inf])
def test_clipping_by_norm_is_what_torch_does(dtype: torch.dtype, bound: float) -> None:
    ours, theirs = layer_with(*gradients(dtype)), layer_with(*gradients(dtype))
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
    torch.testing.assert_close(clip_gradients(ours, max_norm=bound), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=5e-7, atol=0)
    assert any(not torch.equal(p.grad, g) for p, g in zip(ours, gradients(dtype), strict=True)) == (bound < expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_by_value_gives_the_bits_that_torch_gives(dtype: torch.dtype) -> None:
    ours, theirs = layer_with(*gradients(dtype)), layer_with(*gradients(dtype))
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.3)
    norm = gradient_norm(ours)
    assert_same(clip_gradients(ours, clip_value=0.3), norm)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])
    assert norm > gradient_norm(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_gradients_of_16_bits_has_32(dtype: torch.dtype) -> None:
    module = layer_with(*gradients(dtype))
    exact = torch.cat([g.double().flatten() for g in gradients(dtype)]).norm()
    norm = clip_gradients(module, max_norm=1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(p.grad.dtype == dtype for p in module)
    assert gradient_norm(module).item() == pytest.approx(1.0, rel=2**-8)


def test_the_norm_of_a_large_matrix_is_accurate() -> None:
    """torch's own is 5e-4 off here on the CPU: it adds up in a chain, and sharding would change the sum."""
    large = torch.randn(8192, 2048, generator=torch.Generator().manual_seed(0))
    assert gradient_norm(layer_with(large)).item() == pytest.approx(large.double().norm().item(), rel=1e-6)


def test_gradients_of_several_dtypes_have_one_norm() -> None:
    mixed = [g.to(dtype) for g, dtype in zip(gradients(), (torch.bfloat16, torch.float32, torch.float64), strict=True)]
    exact = torch.cat([g.double().flatten() for g in mixed]).norm()
    module = layer_with(*mixed)
    assert clip_gradients(module, max_norm=0.5).item() == pytest.approx(exact.item(), rel=1e-6)
    assert gradient_norm(module).item() == pytest.approx(0.5, rel=2**-8)


def test_parameters_without_gradients_and_empty_ones_count_as_nothing() -> None:
    module = layer_with(None, torch.ones(2, 2), torch.zeros(0, 3), None)
    assert clip_gradients(module, max_norm=1.0).item() == pytest.approx(2.0, rel=1e-6)
    assert module[0].grad is None
    assert gradient_norm(module).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("module", [nn.Identity(), layer_with(None), layer_with(torch.zeros(0))])
def test_no_gradient_at_all_has_norm_zero(module: nn.Module) -> None:
    assert clip_gradients(module, max_norm=1.0).item() == 0.0
    assert clip_gradients(module, clip_value=1.0).item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("algorithm", BOUND)
def test_gradients_that_are_not_finite_end_as_with_torch(algorithm: str, poison: float) -> None:
    grads = gradients()
    grads[1][2] = poison
    ours, theirs = layer_with(*grads), layer_with(*grads)
    norm = clip_gradients(ours, **{BOUND[algorithm]: 0.5})
    assert torch.equal(norm, torch.tensor(poison)) or (math.isnan(poison) and norm.isnan())
    if algorithm == "norm":
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    else:
        torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.5)
    assert_same([p.grad for p in ours], [p.grad for p in theirs])


def test_only_the_parameters_asked_for_are_measured_and_clipped() -> None:
    module = layer_with(torch.ones(2, 2), torch.ones(3, 3))
    assert gradient_norm(module, [module[1]]).item() == 3.0
    assert clip_gradients(module, max_norm=1.0, parameters=iter([module[0]])).item() == pytest.approx(2.0, rel=1e-6)
    assert torch.equal(module[1].grad, torch.ones(3, 3))


def test_a_sparse_gradient_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True))
    module[1](torch.tensor([1, 1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"Expected a dense gradient but 1\.weight of Sequential has a torch\.sparse_coo one"
    ):
        clip_gradients(module, max_norm=1.0)


def test_clipping_reads_nothing_from_the_device() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)
    assert clip_gradients(module, max_norm=1.0).is_meta  # a meta tensor has no value to read
    assert clip_gradients(module, clip_value=1.0).is_meta


@pytest.mark.parametrize("make", [partial(clip_gradients, nn.Identity()), GradientClipping])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "expected exactly one of max_norm and clip_value but got none"),
        ({"max_norm": 1.0, "clip_value": 0.5}, "expected exactly one of max_norm and clip_value but got {'max_norm'"),
        ({"max_norm": 0.0}, r"expected max_norm to be a number > 0 but got 0\.0"),
        ({"max_norm": -1}, "expected max_norm to be a number > 0 but got -1"),
        ({"max_norm": math.nan}, "expected max_norm to be a number > 0 but got nan"),
        ({"clip_value": "1"}, "expected clip_value to be a number > 0 but got '1'"),
        ({"clip_value": True}, "expected clip_value to be a number > 0 but got True"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, bounds, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(**bounds)


def poisoned(value: float | None) -> list[Tensor]:
    """Gradients, one element of which is replaced; None: none is."""
    grads = gradients()
    if value is not None:
        grads[1][2] = value
    return grads


@pytest.mark.parametrize("poison", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bound", BOUND.values())
def test_an_infinite_bound_measures_and_changes_no_bit(bound: str, poison: float | None) -> None:
    module = layer_with(*poisoned(poison))
    norm = clip_gradients(module, **{bound: math.inf})
    assert_same(norm, gradient_norm(module))
    assert norm.isfinite() == (poison is None)
    assert_same(bits([p.grad for p in module]), bits(poisoned(poison)))
