"""The orders of momentum and polar factor: the paper's synthetic table, and NAMO's adaptive number in each order.

`python -m tests.optim.test_orders` prints the table of docs/denoise.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, Muon
from lightning_namo.testing import check_rule

EXACT: dict[str, Any] = {"orthogonalizer": "svd", "weight_decay": 0.0, "shape_scale": None, "nesterov": False}


def denoised(order: str, momentum: float, seed: int) -> list[float]:
    """Gap and subspace error of what is orthogonalized, and alignment of the update with the signal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(normal(100, 3))[0] for _ in range(2))
    signal = left @ torch.diag(torch.tensor([12.0, 8.0, 5.0], dtype=torch.float64)) @ right.T
    weight = nn.Parameter(torch.zeros(100, 100, dtype=torch.float64))
    optimizer = Muon([weight], lr=1.0, momentum=momentum, order=order, **EXACT)  # type: ignore[arg-type]
    before = torch.zeros_like(weight)
    for _ in range(100 if momentum else 1):
        before, weight.grad = weight.detach().clone(), signal + normal(100, 100)
        optimizer.step()
    update = before - weight.detach()
    taken = optimizer.state[weight]["momentum_buffer"] if order == "pre" else weight.grad
    u, sigma, _ = torch.linalg.svd(taken)
    error = math.sqrt(1 - float(torch.linalg.svdvals(u[:, :3].T @ left)[-1]) ** 2)
    return [float(sigma[2] - sigma[3]), error, float((update * signal).sum() / 25)]


def mean(order: str, momentum: float) -> list[float]:
    """Of ten draws."""
    return torch.tensor([denoised(order, momentum, seed) for seed in range(10)]).mean(dim=0).tolist()


def test_momentum_before_the_polar_factor_alone_denoises_as_published() -> None:
    """The table has one draw; the mean of ten is within 0.3 of its gaps, which differ by 0.1 to 0.25 between draws."""
    assert mean("pre", 0.0) == [
        pytest.approx(0.61, abs=0.3),
        pytest.approx(0.998, abs=0.02),
        pytest.approx(0.61, abs=0.03),
    ]
    assert mean("pre", 0.95) == [
        pytest.approx(2.55, abs=0.3),
        pytest.approx(0.30, abs=0.05),
        pytest.approx(0.97, abs=0.02),
    ]
    for order in ("none", "post"):
        gap, error, alignment = mean(order, 0.95)
        assert gap < 1
        assert error > 0.98
        assert alignment < 0.62


def adaptive(order: str, grads: list[Tensor], **keys: Any) -> list[float]:
    """NAMO's a / lr at each step."""
    weight = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = NAMO([weight], lr=1e-3, order=order, **EXACT | keys)  # type: ignore[arg-type]
    optimizer.keeps_readings = True
    found = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        (reading,) = optimizer.readings()["step_scale"].values()
        found.append(reading.item())
    return found


def normal(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 8, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("order", ["pre", "none", "post"])
def test_a_constant_gradient_makes_every_order_muon(order: str) -> None:
    assert adaptive(order, normal(1) * 30, eps=0.0) == pytest.approx([1.0] * 30, abs=1e-9)


@pytest.mark.parametrize("order", ["pre", "none", "post"])
def test_no_order_feels_the_size_of_the_gradient(order: str) -> None:
    grads = normal(10)
    assert adaptive(order, [1e-4 * grad for grad in grads], eps=0.0) == pytest.approx(
        adaptive(order, grads, eps=0.0), rel=1e-9
    )


def test_in_noise_the_scale_is_small_where_there_is_momentum() -> None:
    grads = normal(400)
    of_noise = math.sqrt((1 - 0.95) / (1 + 0.95))
    for order in ("pre", "post"):
        assert sum(adaptive(order, grads)[200:]) / 200 == pytest.approx(of_noise, rel=0.1)
    assert sum(adaptive("none", grads)[200:]) / 200 == pytest.approx(1.0, rel=0.02)


def test_alternating_gradients_cancel_before_as_after_the_polar_factor() -> None:
    (grad,) = normal(1)
    grads = [grad if step % 2 else -grad for step in range(400)]
    for order in ("pre", "post"):
        assert adaptive(order, grads, beta2=0.999)[-1] == pytest.approx(0.05 / 1.95, rel=1e-3)


def test_post_keeps_the_average_of_polar_factors_and_steps_along_it() -> None:
    grads, weight = normal(5), nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    optimizer = NAMO([weight], lr=1e-3, order="post", max_step=None, **EXACT)
    average, expected = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        weight.grad = grad.clone()
        optimizer.step()
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        average = 0.95 * average + 0.05 * u @ vh
        expected = expected - 1e-3 / (1 - 0.95**step) * average.norm() / math.sqrt(8) * average
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], average, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["none", "post"])
def test_other_orders_train_on_shards_and_through_checkpoints(order: str) -> None:
    check_rule(functools.partial(NAMO, order=order))


@pytest.mark.slow
def test_the_average_of_polar_factors_trains_under_every_layout() -> None:
    check_rule(functools.partial(NAMO, order="post"), processes=2)


if __name__ == "__main__":
    for case in (*(("pre", momentum) for momentum in (0.0, 0.5, 0.9, 0.95)), ("none", 0.95), ("post", 0.95)):
        print(*case, *(f"{value:.3f}" for value in mean(*case)))
