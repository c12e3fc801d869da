"""The AdamW half beside torch.optim.AdamW: every layout in memory, complex numbers, gradients that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO
from tests.helpers.optimizers import all_optimizers, parameter, run, set_gradients, snapshot
from tests.helpers.toy import assert_same
from tests.helpers.trajectories import RULES, problem
from tests.reference import drive

HYPER = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}


def ours(parameters: Any, **options: Any) -> NAMO:
    """An optimizer with one matrix, which never has a gradient, and AdamW for the rest."""
    groups = [{"params": [nn.Parameter(torch.eye(2))]}, {"params": parameters, "orthogonalize": False, **HYPER}]
    return NAMO(groups, **options)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contiguous() -> Tensor:
    return randn(6, 4)


def cut() -> Tensor:
    return randn(10, 8)[:, :4]


def every_second() -> Tensor:
    return randn(20)[::2]


def transposed() -> Tensor:
    return randn(4, 6).t()


def channels_last() -> Tensor:
    return randn(3, 2, 4, 5).to(memory_format=torch.channels_last)


def size_one_strides() -> Tensor:
    return torch.empty_strided((1, 4, 1), (9, 1, 13)).copy_(randn(1, 4, 1))


def permuted_with_gap() -> Tensor:
    return randn(4, 3, 8).permute(2, 0, 1)[:5]


def scalar() -> Tensor:
    return randn(3)[1]


def nothing() -> Tensor:
    return randn(3, 4)[:, 4:]


def half_precision() -> Tensor:
    return randn(10, 8).bfloat16()[:, :4]


def complex_numbers() -> Tensor:
    return randn(4, 3, dtype=torch.complex64)


def complex_transposed_cut() -> Tensor:
    return randn(4, 6, dtype=torch.complex128).t()[:, 1:3]


def imaginary_part() -> Tensor:
    return randn(5, dtype=torch.complex64).conj().imag  # with torch's negative bit


PARAMETERS = [
    contiguous,
    cut,
    every_second,
    transposed,
    channels_last,
    size_one_strides,
    permuted_with_gap,
    scalar,
    nothing,
    half_precision,
    complex_numbers,
    complex_transposed_cut,
    imaginary_part,
]


def reverse_dims(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "like the parameter": lambda grad: grad,
    "contiguous": lambda grad: grad.contiguous(),
    "transposed": lambda grad: reverse_dims(reverse_dims(grad).contiguous()),
    "with gaps": lambda grad: torch.stack([grad, torch.full_like(grad, torch.nan)], dim=-1)[..., 0],
    "expanded": lambda grad: grad.flatten()[:1].sum().expand(grad.shape),
    "expanded rows": lambda grad: grad[:1].expand(grad.shape) if grad.dim() else grad,
}


def gradient(parameter: Tensor, step: int, form: str) -> Tensor:
    grad = torch.empty_like(parameter).copy_(randn(*parameter.shape, seed=step + 1, dtype=parameter.dtype))
    return GRADIENTS[form](grad)


@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("make", PARAMETERS, ids=lambda make: make.__name__)
def test_every_layout_in_memory_trains_as_torchs_adamw_does(make: Callable[[], Tensor], form: str) -> None:
    around = make()  # a view, whose storage may hold numbers of no parameter
    parameter = nn.Parameter(around)
    if parameter.untyped_storage().data_ptr() != around.untyped_storage().data_ptr():
        pytest.fail("the parameter is no view of the tensor")
    plain = nn.Parameter(make().clone(memory_format=torch.contiguous_format))
    storage = torch.empty(0, dtype=around.dtype).set_(around.untyped_storage())
    used = torch.zeros_like(storage, dtype=torch.bool)
    used.as_strided(around.shape, around.stride(), around.storage_offset()).fill_(True)
    before = storage.clone()
    in_float32 = True if around.dtype == torch.bfloat16 else None  # torch's default rounds every intermediate value
    optimizer, expected = ours([parameter]), torch.optim.AdamW([plain], **HYPER, fused=in_float32)
    for step in range(4):
        grad = gradient(parameter, step, form)
        kept = grad.clone()
        parameter.grad, plain.grad = grad, grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        expected.step()
        assert torch.equal(parameter.grad, kept)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(parameter, plain, **tolerance)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[parameter][key], expected.state[plain][key], **tolerance)
    assert torch.equal(storage[~used], before[~used])  # nothing else was written to


def test_a_slice_of_an_embedding_trains_alone() -> None:
    whole = randn(10, 8)
    embedding, before = nn.Embedding(10, 4), whole.clone()
    embedding.weight = nn.Parameter(whole[:, :4])
    optimizer = ours([embedding.weight])
    embedding(torch.tensor([9])).sum().backward()
    optimizer.step()
    assert (whole[9, :4] != before[9, :4]).all()
    assert torch.equal(whole[:, 4:], before[:, 4:])


def test_a_model_turned_to_channels_last_after_the_optimizer_was_built_trains_as_torchs() -> None:
    net, twin = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    twin.load_state_dict(net.state_dict())
    optimizer, expected = ours(list(net.parameters())), torch.optim.AdamW(twin.parameters(), **HYPER)
    for step in range(4):
        if step == 2:
            net.to(memory_format=torch.channels_last)
            twin.to(memory_format=torch.channels_last)
        for model, steps in ((net, optimizer), (twin, expected)):
            steps.zero_grad()
            model(randn(2, 3, 6, 6, seed=step)).square().sum().backward()
            steps.step()
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthogonalize", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda: randn(1, 4).expand(6, 4), lambda: randn(9).as_strided((4, 4), (1, 1)), lambda: randn().expand(3, 3)],
    ids=["expanded", "overlapping windows", "one number"],
)
def test_a_parameter_whose_elements_share_memory_is_refused_by_name(
    make: Callable[[], Tensor], orthogonalize: bool
) -> None:
    shared = nn.Parameter(make())
    groups = [
        {"params": [("weight", nn.Parameter(torch.eye(2)))]},
        {"params": [("table", shared)], "orthogonalize": orthogonalize},
    ]
    with pytest.raises(ValueError, match=r"(?s)table.*share memory.*clone"):
        NAMO(groups)
    optimizer = NAMO(groups[:1])
    with pytest.raises(ValueError, match=r"(?s)table.*share memory.*clone"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1


def test_interleaved_elements_that_share_no_memory_are_taken() -> None:
    parameter = nn.Parameter(randn(12).as_strided((2, 3), (3, 2)))
    optimizer = ours([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_a_sparse_parameter_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Expected table to be dense"):
        NAMO([("weight", nn.Parameter(torch.eye(2)))]).add_param_group(
            {"params": [("table", nn.Parameter(torch.eye(3).to_sparse()))], "orthogonalize": False}
        )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, complex(0, torch.nan), complex(torch.inf, 0)])
@pytest.mark.parametrize("make", [contiguous, cut, complex_numbers, complex_transposed_cut], ids=lambda m: m.__name__)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(
    make: Callable[[], Tensor], poison: complex
) -> None:
    parameter = nn.Parameter(make())
    if isinstance(poison, complex) and not parameter.is_complex():
        poison = poison.imag or poison.real
    optimizer = ours([parameter])
    parameter.grad = randn(*parameter.shape, seed=1, dtype=parameter.dtype)
    optimizer.step()
    before = copy.deepcopy((parameter.detach(), dict(optimizer.state[parameter])))
    parameter.grad[2, 1] = poison
    optimizer.step()
    torch.testing.assert_close((parameter.detach(), dict(optimizer.state[parameter])), before, rtol=0, atol=0)
    assert optimizer.skipped_steps() == 1
    parameter.grad = randn(*parameter.shape, seed=2, dtype=parameter.dtype)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.parametrize("make", [contiguous, cut, complex_numbers], ids=lambda make: make.__name__)
def test_a_device_without_the_fused_kernel_trains_alike_and_is_guarded(
    make: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, other = nn.Parameter(make()), nn.Parameter(make())
    answers = []
    for p in (fused, other):
        if p is other:
            monkeypatch.setattr("lightning_namo.optim.adamw._get_fused_kernels_supported_devices", list)
        optimizer = ours([p])
        for step in range(3):
            p.grad = randn(*p.shape, seed=step, dtype=p.dtype)
            if step == 1:
                p.grad[0, 0] = torch.nan
            optimizer.step()
        answers.append((p.detach(), dict(optimizer.state[p]), optimizer.skipped_steps()))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
    assert answers[0][2] == 1
    assert answers[0][1]["step"] == 2


def test_a_complex_gradient_as_large_as_its_dtype_allows_is_finite() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = ours([parameter])
    parameter.grad = torch.full((2,), complex(3e38, 3e38))  # its modulus overflows
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert optimizer.state[parameter]["step"] == 1


ADAMW = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


@all_optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_adamw_groups_run_torchs_adamw(cls, dtype):
    shapes = [(5,), (), (3, 4), (2, 3, 4)]
    ours, theirs = ([parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)] for _ in range(2))
    optimizer = cls(
        [{"params": [parameter(3, 3)]}, {"params": ours, "orthogonalize": False}],
        **{f"adamw_{key}": value for key, value in ADAMW.items()},
    )
    reference = torch.optim.AdamW(theirs, fused=dtype != torch.complex64, **ADAMW)
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = randn(*a.shape, seed=10 * step + index, dtype=dtype)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    exact = 0 if dtype != torch.complex64 else 1e-6  # ours is fused, in real numbers; torch's is not
    torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps", "betas"])
def test_an_adamw_group_takes_torchs_keys(key):
    ours, theirs = parameter(5), parameter(5)
    optimizer = NAMO(
        [{"params": [parameter(3, 3)]}, {"params": [ours], "orthogonalize": False, key: ADAMW[key]}], adamw_lr=0.1
    )
    defaults = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.95)}
    reference = torch.optim.AdamW([theirs], fused=True, **defaults | {key: ADAMW[key]})
    for seed in (1, 2, 3):
        ours.grad = theirs.grad = randn(5, seed=seed)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_large_finite_adamw_gradient_is_not_taken_for_infinite(dtype):
    table, matrix = parameter(500, 64, dtype=dtype), parameter(4, 4)
    optimizer = NAMO([{"params": [matrix]}, {"params": [table], "orthogonalize": False}])
    table.grad, before = torch.full_like(table, 6e4), table.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps() == 0
    assert not torch.equal(table, before)


@all_optimizers
def test_an_adamw_group_is_left_alone_as_a_whole(cls):
    pair = [parameter(5), parameter(3, seed=1)]
    optimizer = cls([{"params": [parameter(6, 4)]}, {"params": pair, "orthogonalize": False}])
    run(optimizer, 0)
    before = [snapshot(optimizer, p) for p in pair]
    set_gradients(optimizer, 1)
    pair[0].grad[0] = inf
    optimizer.step()
    assert_same([snapshot(optimizer, p) for p in pair], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", RULES)
def test_an_adamw_group_is_bitwise_torch_optim_adamw(cls, dtype):
    hyper = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.05}
    W, gradients = problem(7, 5, dtype=dtype)
    expected = drive(torch.optim.AdamW, W, gradients, fused=True, **hyper)
    hyper = {f"adamw_{name}": value for name, value in hyper.items()}
    actual = drive(partial(adamw_group, cls), W, gradients, **hyper)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cls", RULES)
def test_an_adamw_group_shares_the_learning_rate_by_default(cls):
    W, gradients = problem(7, 5, dtype=torch.float32)
    expected = drive(
        torch.optim.AdamW, W, gradients, fused=True, lr=0.007, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    for ours, theirs in zip(drive(partial(adamw_group, cls), W, gradients, lr=0.007), expected, strict=True):
        assert torch.equal(ours, theirs)


def adamw_group(cls, params, **hyper):
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    return cls([{"params": [matrix]}, {"params": params, "orthogonalize": False}], **hyper)
