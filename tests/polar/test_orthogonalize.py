"""Polar factors: exact, and by Newton-Schulz against its polynomials in float64 and in plain bfloat16."""

import subprocess
import sys
from collections import defaultdict
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lightning_namo
from lightning_namo import NAMO, orthogonalize
from lightning_namo.polar.cost import newton_schulz_flops
from lightning_namo.polar.iteration_dtype import ITERATION_DTYPE, _fastest_dtype, iteration_dtype
from lightning_namo.polar.newton_schulz import _NORM_EPS, _normalize
from lightning_namo.workspace import Workspace
from tests.helpers.iteration import ITERATIONS, iterating_in
from tests.reference import POLAR_EXPRESS, QUINTIC, newton_schulz, polar

POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
RANGES = {"quintic": (0.68, 1.205), "polar_express": (0.86, 1.14)}  # of outputs, where inputs are >= 0.003
# Of the error of the plain iteration in the same dtype. In float32 the Gram square, which is there for bfloat16, has up
# to 1.55 of it (measured; the median is at most 1.12), and that is at most 1.4e-4.
BOUND = {torch.bfloat16: 1.0, torch.float32: 2.0}
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


# --- how exact the iteration is -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@each_dtype
def test_it_is_as_exact_as_the_plain_iteration(dtype, coefficients, shape, power):
    polynomials = POLYNOMIALS[coefficients]
    spectrum = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
    ours = plain = 0.0
    for seed in range(3):
        X = matrix(*shape, spectrum, seed=seed)
        exact = newton_schulz(X.double(), polynomials, torch.float64)
        ours += relative(orthogonalize(X, ns_coefficients=coefficients, dtype=dtype), exact)
        plain += relative(newton_schulz(X, polynomials, dtype), exact)
    assert ours <= BOUND[dtype] * plain


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@each_dtype
def test_a_list_of_many_shapes_is_as_exact_as_the_plain_iteration(dtype, coefficients, shape):
    """In a list, matrices of one short side may share a batch."""
    shapes = [shape, shape[::-1], (min(shape), 3 * min(shape)), (min(shape), min(shape))]
    matrices = [
        matrix(m, n, 1 / torch.arange(1, min(m, n) + 1, dtype=torch.float64), seed=seed)
        for seed, (m, n) in enumerate(shapes)
    ]
    for X, Q in zip(matrices, orthogonalize(matrices, ns_coefficients=coefficients, dtype=dtype), strict=True):
        exact = newton_schulz(X.double(), POLYNOMIALS[coefficients], torch.float64)
        assert relative(Q, exact) <= BOUND[dtype] * relative(newton_schulz(X, POLYNOMIALS[coefficients], dtype), exact)


@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@each_dtype
def test_of_flat_spectra_the_error_is_smaller_on_average_over_sizes(dtype, coefficients):
    """All singular values are one number there, and the error is how that one happens to round."""
    ours = plain = 0.0
    for short in range(64, 160, 8):
        X = matrix(short, 2 * short, torch.ones(short, dtype=torch.float64))
        exact = newton_schulz(X.double(), POLYNOMIALS[coefficients], torch.float64)
        ours += relative(orthogonalize(X, ns_coefficients=coefficients, dtype=dtype), exact) ** 2
        plain += relative(newton_schulz(X, POLYNOMIALS[coefficients], dtype), exact) ** 2
    assert ours <= BOUND[dtype] ** 2 * plain


@cache
def decomposed(shape, power):
    """A float32 matrix with the eigenvalues and eigenvectors of its smaller Gram matrix, normalized, in float64."""
    X = matrix(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power)
    Y = X.double() if X.shape[0] <= X.shape[1] else X.double().T
    Y /= Y.norm() + _NORM_EPS
    return X, *torch.linalg.eigh(Y @ Y.T)


def by_eigenvalues(X, values, vectors, polynomials):
    """The iteration in float64 at the cost of two products."""
    factor, values = torch.ones_like(values), values.clone()
    for a, b, c in polynomials:
        step = a + b * values + c * values**2
        factor, values = factor * step, values * step**2
    Y = X.double() / (X.double().norm() + _NORM_EPS)
    return (vectors * factor) @ (vectors.T @ Y) if X.shape[0] <= X.shape[1] else ((Y @ vectors) * factor) @ vectors.T


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(72, 216), (200, 100), *large((1536, 512), (768, 1536), (900, 771))])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@each_dtype
def test_steps_by_way_of_the_square_are_as_exact(dtype, coefficients, shape, power):
    if dtype == torch.bfloat16 and min(shape) > 200 and _fastest_dtype("cpu") != dtype:
        pytest.skip("large matrices in bfloat16 take minutes on a CPU without its instructions")
    X, values, vectors = decomposed(shape, power)
    exact = by_eigenvalues(X, values, vectors, POLYNOMIALS[coefficients])
    ours = relative(orthogonalize(X, ns_coefficients=coefficients, dtype=dtype), exact)
    assert ours <= BOUND[dtype] * relative(newton_schulz(X, POLYNOMIALS[coefficients], dtype), exact)


@pytest.mark.parametrize("shape", [(72, 216), (200, 100), (201, 200)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_the_polynomials_of_the_eigenvalues_are_the_iteration(coefficients, shape):
    polynomials = POLYNOMIALS[coefficients]
    X, values, vectors = decomposed(shape, 2.0)
    exact = newton_schulz(X.double(), polynomials, torch.float64)
    assert relative(by_eigenvalues(X, values, vectors, polynomials), exact) < 1e-10


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


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_a_parameter_may_be_orthogonalized(method):
    weight = torch.nn.Parameter(matrix(3, 5))
    Q = orthogonalize(weight, method=method)
    assert not Q.requires_grad
    assert torch.equal(Q, orthogonalize(weight.detach(), method=method))


def test_a_cpu_computes_five_eighths_of_symmetric_products():
    with FlopCounterMode(display=False) as counted:
        orthogonalize(torch.ones(768, 3072))
    assert counted.get_total_flops() == 2 * 768**3 * (2 * 4 + 5 / 8 * (2 * 4 + 14))
    assert newton_schulz_flops((768, 3072), 5) == 2 * 768**3 * (2 * 4 + (2 * 4 + 14))  # as accelerators do


@pytest.mark.parametrize("shape", [*SHAPES, *large((771, 1200), (1200, 771), (780, 771))])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_float64_is_the_polynomial_itself(coefficients, shape):
    X = matrix(*shape, dtype=torch.float64)
    Q = orthogonalize(X, ns_coefficients=coefficients, dtype=torch.float64)
    assert relative(Q, newton_schulz(X, POLYNOMIALS[coefficients], torch.float64)) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_ns_steps_stops_after_that_many_polynomials(coefficients, shape, steps):
    X = matrix(*shape, dtype=torch.float64)
    Q = orthogonalize(X, ns_steps=steps, ns_coefficients=coefficients, dtype=torch.float64)
    assert relative(Q, newton_schulz(X, POLYNOMIALS[coefficients][:steps], torch.float64)) < 1e-10


@pytest.mark.parametrize(
    "triples", [[(1.5, -0.5, 0.0)] * 3, ((3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375))]
)
def test_coefficients_of_ones_own_are_taken_in_their_order(triples):
    X = matrix(24, 40, dtype=torch.float64)
    Q = orthogonalize(X, ns_steps=3, ns_coefficients=triples, dtype=torch.float64)
    assert relative(Q, newton_schulz(X, triples, torch.float64)) < 1e-10


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 0.0), (torch.float32, 0.0), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_singular_values_land_in_the_published_range(coefficients, shape, dtype, slack):
    spectrum = torch.logspace(0, -2, 64, dtype=torch.float64)
    spectrum[-1] = 0.003 * spectrum.norm()
    singular = torch.linalg.svdvals(
        orthogonalize(matrix(*shape, spectrum), ns_coefficients=coefficients, dtype=dtype).double()
    )
    low, high = RANGES[coefficients]
    assert low - slack <= singular.min()
    assert singular.max() <= high + slack


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


def test_squares_of_one_short_side_go_through_one_batch():
    shapes = [(64, 128), (200, 64), (64, 300)]
    with Products() as products:
        orthogonalize([matrix(*shape) for shape in shapes])
    in_squares, on_matrices = products.batches[(64, 64)], sum(products.batches[shape] != [] for shape in shapes)
    assert set(in_squares) == {1, 3}  # each Gram square on its own, into the batch of all three
    assert on_matrices == 3


class Products(TorchDispatchMode):
    """Sizes of the batches of products by the shape of the result."""

    def __init__(self):
        super().__init__()
        self.batches = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.batches[tuple(out.shape[1:])].append(len(out))
        return out


# --- in which dtype -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_a_cpu_iterates_in_bfloat16_where_it_has_the_instructions(monkeypatch, capabilities, expected):
    """What the CPU can do is stood in for: there is one CPU here."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.delenv(ITERATION_DTYPE, raising=False)
    _fastest_dtype.cache_clear()
    try:
        assert iteration_dtype("cpu") is expected
        X = matrix(64, 128)
        assert torch.equal(orthogonalize(X), orthogonalize(X, dtype=expected))
    finally:
        _fastest_dtype.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_environment_variable_overrules_every_device(iteration, device):
    assert iteration_dtype(device) is getattr(torch, iteration)


def test_matrices_are_iterated_in_the_dtype_of_the_environment_variable_unless_they_are_given_one(iteration):
    X, dtype = matrix(24, 48), getattr(torch, iteration)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert torch.equal(orthogonalize(X), orthogonalize(X, dtype=dtype))
    assert not torch.equal(orthogonalize(X), orthogonalize(X, dtype=other))
    with iterating_in(None):
        assert torch.equal(orthogonalize(X, dtype=dtype), orthogonalize(X, dtype=iteration_dtype("cpu"))) == (
            iteration_dtype("cpu") == dtype
        )


# Of the package only what is asked, as all of it imports Lightning, which takes seconds.
PROGRAM = f"""
import sys, types
package = sys.modules["lightning_namo"] = types.ModuleType("lightning_namo")
package.__path__ = {lightning_namo.__path__}
from lightning_namo.polar.iteration_dtype import iteration_dtype
print(iteration_dtype("cpu"))
"""


@pytest.mark.slow
def test_processes_that_are_started_inherit_the_environment_variable(iteration):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"torch.{iteration}"


@pytest.mark.parametrize("value", ["fp32", "torch.float32", "float64", "FLOAT32", " "])
def test_another_value_of_the_environment_variable_is_refused_in_words(value):
    message = rf"Expected .* {ITERATION_DTYPE} to be 'bfloat16' or 'float32', or not to be set. Got '{value}'."
    with iterating_in(value), pytest.raises(ValueError, match=message):
        orthogonalize(matrix(3, 5))
    optimizer = NAMO([torch.nn.Parameter(matrix(3, 5))])
    with iterating_in(value), pytest.raises(ValueError, match=message):
        optimizer.step()  # without a gradient: on every rank, whatever it owns


def test_the_memory_of_an_iteration_whose_results_are_converted_is_used_for_the_next_matrices(iteration):
    """Of two short sides, so that there are two iterations; a float32 one of bfloat16 matrices converts."""
    matrices = [matrix(24, 64).bfloat16(), matrix(32, 64).bfloat16()]
    sizes = []
    for given in (matrices[1:], matrices):
        workspace = Workspace()
        with workspace.frame():
            orthogonalize(given, workspace=workspace)
        sizes.append(workspace.nbytes)
    results = 0 if iteration == "float32" else matrices[0].nbytes  # of the first, which stay
    assert sizes[1] <= sizes[0] + results


# --- what it takes and gives ----------------------------------------------------------------------

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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_small_numbers_of_16_bits_are_normalized(dtype, scale):
    """The norm of a row of these does not fit into float16."""
    X = (matrix(64, 96).clamp(-2, 2) * scale).to(dtype)
    for working in (torch.bfloat16, torch.float32):
        assert relative(orthogonalize(X, dtype=working), orthogonalize(X.float(), dtype=working).double()) <= 4e-2


@pytest.mark.parametrize(("dtype", "wider"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_wider_iteration_divides_in_its_own_dtype(dtype, wider):
    X, out = matrix(8, 12).to(dtype)[None], torch.empty(1, 8, 12, dtype=wider)
    _normalize(X, out)
    torch.testing.assert_close(
        out, X.to(wider) / (X.to(wider).norm() + _NORM_EPS), rtol=8 * torch.finfo(wider).eps, atol=0
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_single_row_or_column_is_normalized(shape, dtype, rtol):
    X = matrix(*shape)
    torch.testing.assert_close(orthogonalize(X, method="svd"), X / X.norm())
    Q = orthogonalize(X, dtype=dtype)
    assert 0.68 <= Q.norm() <= 1.205
    torch.testing.assert_close(Q / Q.norm(), X / X.norm(), rtol=rtol, atol=0)


# By dtype: 2^k times elements of about 1 is a matrix whose squared norm overflows, but for float16; and one that is far
# from it, beside whose norm 1e-7 is nothing.
LARGE = {torch.float16: (14, 10), torch.bfloat16: (120, 40), torch.float32: (120, 40), torch.float64: (1000, 40)}


def of_exponent(shape, exponent, dtype, seed=0):
    """Numbers of float16's precision at most, so that every dtype has them."""
    return matrix(*shape, seed=seed).clamp(-2, 2).to(torch.bfloat16).to(torch.float64).mul(2.0**exponent).to(dtype)


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
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-120, -60, -10, 0, 10, 50])
def test_a_matrix_beside_one_whose_norm_overflows_keeps_its_bits(dtype, given, exponent):
    """With a workspace, as the optimizers call it, nothing is done about the norm."""
    shapes = [(12, 12), (70, 100), (100, 70)]
    if given == torch.float16:
        exponent = min(exponent, 10)
    matrices = [of_exponent(shape, exponent, given) for shape in shapes]
    huge = [of_exponent(shape, LARGE[given][0], given) for shape in shapes]
    for X, Y in zip(matrices, huge, strict=True):
        workspace = Workspace()
        with workspace.frame():
            expected = orthogonalize(torch.stack([X, X]), dtype=dtype, workspace=workspace)[0].clone()
        assert torch.equal(orthogonalize(torch.stack([X, Y]), dtype=dtype)[0], expected)


@each_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_a_matrix_that_is_not_finite_gives_nan_by_iteration_and_zeros_by_svd(dtype, bad, given):
    X = of_exponent((6, 9), LARGE[given][0], given)
    X[2, 3] = bad
    assert orthogonalize(X, dtype=dtype).isnan().all()
    assert torch.equal(orthogonalize(X, method="svd"), torch.zeros_like(X))


@each_dtype
def test_the_iteration_reads_nothing_from_the_device(dtype):
    """There is nothing to read on the meta device: it would raise."""
    assert orthogonalize([torch.ones(4, 6, device="meta"), torch.ones(2, 6, 4, device="meta")], dtype=dtype)[0].is_meta


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
