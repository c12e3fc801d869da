"""Polar factors: exact, and by Newton-Schulz against its polynomials in float64 and in plain bfloat16."""

from collections import defaultdict

import pytest
import torch
from reference import POLAR_EXPRESS, QUINTIC, newton_schulz, polar
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_namo import orthogonalize
from lightning_namo.orthogonalize import _NORM_EPS, _normalize, iteration_dtype, newton_schulz_flops

POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}
RANGES = {"quintic": (0.68, 1.205), "polar_express": (0.86, 1.14)}  # of outputs, where inputs are >= 0.003
# long / short = 1 ... 4; from 64 and 1.5 on steps go by way of the Gram square
SHAPES = [(64, 64), (128, 128), (32, 64), (128, 64), (48, 144), (192, 48), (64, 256), (256, 64)]


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


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_bfloat16_is_no_less_exact_than_the_plain_iteration(coefficients, shape, power):
    polynomials = POLYNOMIALS[coefficients]
    spectrum = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
    ours = plain = 0.0
    for seed in range(3):
        X = matrix(*shape, spectrum, seed=seed)
        exact = newton_schulz(X.double(), polynomials, torch.float64)
        ours += relative(orthogonalize(X, ns_coefficients=coefficients), exact)
        plain += relative(newton_schulz(X, polynomials), exact)
    assert ours <= plain


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_a_list_of_many_shapes_is_no_less_exact_than_the_plain_iteration(coefficients, shape):
    """In a list, matrices of one short side may share a batch."""
    shapes = [shape, shape[::-1], (min(shape), 3 * min(shape)), (min(shape), min(shape))]
    matrices = [
        matrix(m, n, 1 / torch.arange(1, min(m, n) + 1, dtype=torch.float64), seed=seed)
        for seed, (m, n) in enumerate(shapes)
    ]
    for X, Q in zip(matrices, orthogonalize(matrices, ns_coefficients=coefficients), strict=True):
        exact = newton_schulz(X.double(), POLYNOMIALS[coefficients], torch.float64)
        assert relative(Q, exact) <= relative(newton_schulz(X, POLYNOMIALS[coefficients]), exact)


@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_of_flat_spectra_the_error_is_smaller_on_average_over_sizes(coefficients):
    """All singular values are one number there, and the error is how that one happens to round."""
    ours = plain = 0.0
    for short in range(64, 160, 8):
        X = matrix(short, 2 * short, torch.ones(short, dtype=torch.float64))
        exact = newton_schulz(X.double(), POLYNOMIALS[coefficients], torch.float64)
        ours += relative(orthogonalize(X, ns_coefficients=coefficients), exact) ** 2
        plain += relative(newton_schulz(X, POLYNOMIALS[coefficients]), exact) ** 2
    assert ours <= plain


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(72, 216), (200, 100), (1536, 512), (768, 1536), (900, 771)])
@pytest.mark.parametrize("coefficients", POLYNOMIALS)
def test_steps_by_way_of_the_square_are_no_less_exact(coefficients, shape, power):
    X = matrix(*shape, torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power)
    exact = newton_schulz(X.double(), POLYNOMIALS[coefficients], torch.float64)
    ours = relative(orthogonalize(X, ns_coefficients=coefficients), exact)
    assert ours <= relative(newton_schulz(X, POLYNOMIALS[coefficients]), exact)


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


@pytest.mark.parametrize("shape", [*SHAPES, (771, 1200), (1200, 771), (780, 771)])
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


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 0.0), (torch.bfloat16, 0.02)])
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
    iteration_dtype.cache_clear()
    try:
        assert iteration_dtype("cpu") is expected
        X = matrix(64, 128)
        assert torch.equal(orthogonalize(X), orthogonalize(X, dtype=expected))
    finally:
        iteration_dtype.cache_clear()


# --- what it takes and gives ----------------------------------------------------------------------

METHODS = [{"method": "svd"}, {"dtype": torch.float64}, {"dtype": torch.float32}, {}]
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
    for working in (None, torch.float32):
        assert relative(orthogonalize(X, dtype=working), orthogonalize(X.float(), dtype=working).double()) <= 4e-2


@pytest.mark.parametrize(("dtype", "wider"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_wider_iteration_divides_in_its_own_dtype(dtype, wider):
    X, out = matrix(8, 12).to(dtype)[None], torch.empty(1, 8, 12, dtype=wider)
    _normalize(X, out)
    torch.testing.assert_close(
        out, X.to(wider) / (X.to(wider).norm() + _NORM_EPS), rtol=8 * torch.finfo(wider).eps, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_a_single_row_or_column_is_normalized(shape):
    X = matrix(*shape)
    torch.testing.assert_close(orthogonalize(X, method="svd"), X / X.norm())
    Q = orthogonalize(X)
    assert 0.68 <= Q.norm() <= 1.205
    torch.testing.assert_close(Q / Q.norm(), X / X.norm(), rtol=1e-2, atol=0)


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
