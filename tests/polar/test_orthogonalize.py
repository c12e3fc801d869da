"""`orthogonalize`: what it takes and gives, by SVD and by Newton-Schulz."""

import pytest
import torch

from lightning_namo import orthogonalize
from tests.helpers.matrices import LARGE, each_dtype, matrix, of_exponent, relative
from tests.reference import polar


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_a_parameter_may_be_orthogonalized(method):
    weight = torch.nn.Parameter(matrix(3, 5))
    Q = orthogonalize(weight, method=method)
    assert not Q.requires_grad
    assert torch.equal(Q, orthogonalize(weight.detach(), method=method))


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_svd_is_the_exact_polar_factor(shape):
    X = matrix(*shape, dtype=torch.float64)
    Q = orthogonalize(X, method="svd")
    assert relative(Q, polar(X)) < 1e-12
    gram = Q @ Q.T if shape[0] <= shape[1] else Q.T @ Q
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-12)
    assert relative(Q @ (Q.T @ X), X) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_svd_of_a_rank_deficient_matrix_is_a_partial_isometry(shape, dtype):
    spectrum = torch.zeros(min(shape), dtype=torch.float64)
    spectrum[:2] = torch.tensor([3.0, 0.01])
    X = matrix(*shape, spectrum, dtype=dtype)
    Q = orthogonalize(X, method="svd")
    expected = torch.tensor([1.0, 1.0] + [0.0] * (min(shape) - 2), dtype=dtype)
    torch.testing.assert_close(torch.linalg.svdvals(Q), expected)
    torch.testing.assert_close(Q @ Q.T @ X, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (200, 16)])
def test_svd_of_a_low_precision_matrix_is_that_of_its_values(shape, dtype):
    X = matrix(*shape).to(dtype)
    assert relative(orthogonalize(X, method="svd"), polar(X.double())) < 4 * torch.finfo(dtype).eps


METHODS = [{"method": "svd"}, {"dtype": torch.float64}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}]
each_method = pytest.mark.parametrize("method", METHODS, ids=["svd", "float64", "float32", "bfloat16"])


def tolerance(method):
    """Another path may sum in another order: twice the error of the iteration in bfloat16, hence 4e-2."""
    return {"svd": 1e-6, torch.float64: 1e-6, torch.float32: 1e-4}.get(*method.values() or (None,), 4e-2)


@each_method
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8), (1, 7), (7, 1), (1, 1)])
def test_a_batch_is_its_matrices_one_by_one(method, shape):
    batch = torch.stack([matrix(*shape, seed=seed) for seed in range(4)])
    for X, Q in zip(batch, orthogonalize(batch, **method), strict=True):
        assert relative(Q, orthogonalize(X, **method).double()) <= tolerance(method)


@each_method
def test_a_list_is_its_matrices_one_by_one_in_their_order(method):
    shapes = [(16, 16), (8, 24), (24, 8), (8, 8), (1, 7), (8, 24), (7, 1), (1, 1), (16, 48)]
    matrices = [matrix(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    result = orthogonalize(matrices, **method)
    assert isinstance(result, list)
    for X, Q in zip(matrices, result, strict=True):
        assert Q.shape == X.shape
        assert relative(Q, orthogonalize(X, **method).double()) <= tolerance(method)


def test_an_empty_list_gives_an_empty_list():
    assert orthogonalize([]) == []


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_dtype_are_those_of_the_input(method, dtype):
    wide = matrix(6, 9, dtype=dtype)
    for X in (wide, wide.T, wide.expand(2, 6, 9)):
        Q = orthogonalize(X, **method)
        assert (Q.shape, Q.dtype) == (X.shape, dtype)


@each_method
@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1), (1, 1)])
def test_a_zero_matrix_stays_zero(method, shape):
    assert torch.equal(orthogonalize(torch.zeros(shape), **method), torch.zeros(shape))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_single_row_or_column_is_normalized(shape, dtype, rtol):
    X = matrix(*shape)
    torch.testing.assert_close(orthogonalize(X, method="svd"), X / X.norm())
    Q = orthogonalize(X, dtype=dtype)
    assert 0.68 <= Q.norm() <= 1.205
    torch.testing.assert_close(Q / Q.norm(), X / X.norm(), rtol=rtol, atol=0)


@each_method
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("shape", [(1, 1), (12, 12), (70, 100), (100, 70)])
def test_a_matrix_whose_norm_overflows_is_orthogonalized_as_a_smaller_one(method, dtype, shape):
    (huge, expected), (second, second_expected) = (
        [of_exponent(shape, exponent, dtype, seed) for exponent in LARGE[dtype]] for seed in (0, 1)
    )
    same = torch.equal if "method" not in method else lambda a, b: relative(a, b.double()) <= 4 * torch.finfo(dtype).eps
    for turned in (lambda X: X, lambda X: X.mT.contiguous().mT):
        Q = orthogonalize(turned(expected), **method)
        assert Q.norm() >= 0.6
        assert same(orthogonalize(turned(huge), **method), Q)
        batch = orthogonalize(turned(torch.stack([huge, second])), **method)
        assert same(batch, orthogonalize(turned(torch.stack([expected, second_expected])), **method))
        results = orthogonalize([turned(huge), turned(second)], **method)
        for of_huge, of_expected in zip(
            results, orthogonalize([turned(expected), turned(second_expected)], **method), strict=True
        ):
            assert same(of_huge, of_expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_orthogonalized(dtype):
    largest = torch.finfo(dtype).max
    Q = orthogonalize(torch.diag(torch.tensor([largest, -largest, largest], dtype=dtype)), dtype=torch.float64)
    expected = orthogonalize(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)), dtype=torch.float64)
    assert relative(Q, expected) <= max(1e-6, torch.finfo(dtype).eps)  # of the 1e-7 on a norm of 1.7


@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_a_matrix_that_is_not_finite_gives_nan_by_iteration_and_zeros_by_svd(dtype, bad, given):
    X = of_exponent((6, 9), LARGE[given][0], given)
    X[2, 3] = bad
    assert orthogonalize(X, dtype=dtype).isnan().all()
    assert torch.equal(orthogonalize(X, method="svd"), torch.zeros_like(X))


@each_method
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_the_memory_layout_of_the_input_does_not_matter(method, shape):
    X = matrix(*shape)
    expected = orthogonalize(X, **method).double()
    strided = torch.zeros(2 * shape[0], 3 * shape[1])[::2, ::3].copy_(X)
    for view in (X.T.contiguous().T, strided):
        assert not view.is_contiguous()
        assert relative(orthogonalize(view, **method), expected) <= tolerance(method)


@each_method
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_the_transpose_gives_the_transpose(method, shape):
    X = matrix(*shape)
    assert relative(orthogonalize(X.T, **method).T, orthogonalize(X, **method).double()) <= tolerance(method)


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_the_input_is_never_modified(method, dtype, shape):
    X = matrix(*shape, dtype=dtype)
    before = X.clone()
    orthogonalize(X, **method)
    orthogonalize(X[None], **method)
    orthogonalize([X, X], **method)
    assert torch.equal(X, before)


@each_method
def test_one_matrix_that_is_not_finite_leaves_the_others_alone(method):
    good = [matrix(8, 12, seed=seed) for seed in range(2)]
    bad = torch.full((8, 12), torch.nan)
    for Q, X in zip(orthogonalize([good[0], bad, good[1]], **method)[::2], good, strict=True):
        assert relative(Q, orthogonalize(X, **method).double()) <= tolerance(method)


@pytest.mark.parametrize(
    ("X", "arguments", "message"),
    [
        (torch.ones(3, 3), {"ns_coefficients": "septic"}, "septic"),
        (torch.ones(3, 3), {"ns_coefficients": [(1.0, 2.0)]}, "ns_coefficients"),
        (torch.ones(3, 3), {"ns_coefficients": []}, "ns_coefficients"),
        (torch.ones(3, 3), {"ns_steps": 0}, "ns_steps"),
        (torch.ones(3, 3), {"method": "qr"}, "qr"),
        (torch.ones(3), {}, r"\(3,\)"),
        ([torch.ones(3, 3), torch.ones(4)], {}, r"\(4,\)"),
    ],
)
def test_what_cannot_be_orthogonalized_is_refused_by_name(X, arguments, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(X, **arguments)
