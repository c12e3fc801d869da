"""The update rules of the papers, as pure functions on one matrix and its statistics.

Notation: weight ``W`` (m, n), gradient ``G``, momentum ``M``, direction ``N`` that is orthogonalized, its polar factor
``O``, step ``t = 1, 2, ...``, learning rate ``lr``. Rows are output features, columns input features. Statistics
may carry leading dimensions: whatever is said of one number holds for a batch of them.

References:
    NAMO and NAMO-D: "Adam Improves Muon", arXiv 2602.17080, algorithms 1 and 2.
    Muon: kellerjordan.github.io/posts/muon; match of the update's RMS: "Muon is Scalable", arXiv 2502.16982.
    AdaMuon: arXiv 2507.11005.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

Decay = Literal["adaptive", "lr"]
Order = Literal["pre", "none", "post"]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]
T = TypeVar("T", bound=Any)  # numbers or elements of a rule


class HyperParameters(SimpleNamespace):
    """Of a group, as attributes."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Expected the hyper-parameters to have {name}, but there are {', '.join(sorted(vars(self)))}. Give "
            f'super().__init__ of the class a value: {{"{name}": ...}}.'
        )


def bias_correction(decay: float, step: Tensor) -> Tensor:
    """``1 - decay^t``, without the cancellation that a power near one suffers in float32."""
    return -torch.expm1(step * math.log(decay)) if decay > 0 else torch.ones_like(step)


def direction(grad: Tensor, buffer: Tensor, *, momentum: float, nesterov: bool, out: Tensor | None = None) -> Tensor:
    """The direction N to orthogonalize, from the momentum before this step.

    ``N = (1 - mu) G + mu M'`` with Nesterov, else ``N = M'``, where ``M' = M + (1 - mu)(G - M)`` is the new momentum.
    Put together, N is the average of M and G with the weight ``1 - mu^2`` or ``1 - mu`` on G.

    Args:
        grad: Gradient G, any shape.
        buffer: Momentum M before this step, of the same shape and dtype.
        momentum: Decay mu of the average, in [0, 1).
        nesterov: Whether to look ahead (official code) or not (the paper's algorithm).
        out: Where to write N.
    """
    return torch.lerp(buffer, grad, gradient_weight(momentum, nesterov), out=out)


def gradient_weight(momentum: float, nesterov: bool) -> float:
    """The weight of G in N, the average of M before this step and G; see `direction`."""
    return 1 - momentum**2 if nesterov else 1 - momentum


def update_momentum(grad: Tensor, buffer: Tensor, *, momentum: float) -> None:
    """``M <- M + (1 - mu)(G - M)`` in place.

    Args:
        grad: Gradient G, any shape.
        buffer: Momentum M, of the same shape and dtype.
        momentum: Decay mu of the average, in [0, 1).
    """
    buffer.lerp_(grad, 1 - momentum)


def look_ahead(grad: Tensor, buffer: Tensor, *, momentum: float, out: Tensor | None = None) -> Tensor:
    """Nesterov's direction ``N = (1 - mu) G + mu M``, from the momentum after this step; `direction` is from before.

    Args:
        grad: Gradient G, any shape.
        buffer: The new momentum M, of the same shape and dtype.
        momentum: Decay mu of the average, in [0, 1).
        out: Where to write N; ``grad`` itself overwrites it.
    """
    return torch.lerp(grad, buffer, momentum, out=out)


def adam_correction(step: Tensor, h: HyperParameters) -> Tensor:
    """Adam's ``sqrt(1 - mu2^t) / (1 - mu1^t)`` as the official code has it, Nesterov or not.

    Args:
        step: t.
        h: With momentum (mu1) and beta2 (mu2).
    """
    return bias_correction(h.beta2, step).sqrt() / (bias_correction(h.momentum, step) + 1e-12)


def signal_fraction(direction_sq: Tensor, second_moment: Tensor, step: Tensor, h: HyperParameters) -> Tensor:
    """``rho = ||S||^2 / (||S||^2 + E||Xi||^2)`` of gradients ``G = S + Xi``: how much of them is not noise.

    N and v are averages of the last gradients with known weights w and u. If S has not changed while they were taken,
    and the noises Xi are independent, ``E||N||^2 = (sum w)^2 ||S||^2 + sum w^2 E||Xi||^2``, and v is an average of
    ``||S||^2 + E||Xi||^2``. Solved for rho at every step t, not only at the limit. A signal that turns within the
    averages' 1 / (1 - mu1) steps counts as noise, and one that swings to and fro makes the estimate negative.

    Args:
        direction_sq: ``||N||_F^2``.
        second_moment: v, the average of ``||G||_F^2`` from zero.
        step: t.
        h: With momentum (mu1), nesterov and beta2 (mu2).

    Returns:
        An estimate of rho without bias, which may be below 0 or above 1; NaN where the averages say nothing: in the
        first step, without momentum, or after zero gradients.

    References:
        The model is that of "Denoise First, Orthogonalize Later", arXiv 2606.03899; the estimate is ours.
    """
    mu = h.momentum
    total = bias_correction(mu, step)
    squares = (1 - mu) / (1 + mu) * bias_correction(mu**2, step)
    if h.nesterov:
        total = (1 - mu) + mu * total
        squares = mu**2 * squares + (1 - mu) ** 2 * (1 + 2 * mu)
    alpha_sq = direction_sq * bias_correction(h.beta2, step) / second_moment
    rho = (alpha_sq - squares) / (total**2 - squares)
    return cast(Tensor, rho).masked_fill((step < 2) | (mu == 0) | (second_moment == 0), math.nan)


def ratio(numerator: T | float, denominator: T) -> T:
    """``numerator / denominator``, and 0 where the denominator is: where nothing but zero gradients came."""
    return cast(T, numerator / denominator.masked_fill(denominator == 0, math.inf))


def shape_factor(shape: tuple[int, int], shape_scale: float | None) -> float:
    """``shape_scale * sqrt(max(m, n))``, which gives an orthogonal update Adam's RMS at 0.2; None: 1 (NAMO's paper)."""
    return 1.0 if shape_scale is None else shape_scale * math.sqrt(max(shape))


def rms_factor(shape: tuple[int, int], shape_scale: float | None) -> float:
    """``shape_scale * sqrt(m n)``, the norm of an update whose RMS is shape_scale; 0.2 is Adam's, None: 1."""
    return (1.0 if shape_scale is None else shape_scale) * math.sqrt(math.prod(shape))


def capped(step_size: Tensor, max_step: float | None) -> Tensor:
    """``min(a, max_step)``; None: no cap (the paper's algorithm)."""
    return step_size if max_step is None else step_size.clamp(max=max_step)


def decay_factor(step_size: Tensor, h: HyperParameters) -> Tensor:
    """What the weight is multiplied by: ``1 - lambda min(a, max_step)`` ("adaptive") or ``1 - lr lambda`` ("lr").

    Args:
        step_size: a, of any shape.
        h: With lr, weight_decay (lambda), max_step (None: no cap) and decay: "adaptive" couples the decay to a (NAMO),
            "lr" to the learning rate (Muon).
    """
    if h.decay == "lr":
        return cast(Tensor, torch.ones_like(step_size) - h.lr * h.weight_decay)
    return cast(Tensor, 1 - h.weight_decay * capped(step_size, h.max_step))


def apply_update(weights: Tensors, directions: Tensors, sizes: Tensors, factors: Tensors | None) -> None:
    """``W <- factor W - size O`` in place, in at least float32, rounded once.

    Args:
        weights: W, of any shape; updated in place.
        directions: O (or AdaMuon's U), of the same shapes.
        sizes: Of `update_size`; each broadcasts against its weight.
        factors: Of `decay_factor`, likewise; None: 1.
    """
    if not weights or weights[0].dtype == sizes[0].dtype:
        if factors is not None:
            torch._foreach_mul_(weights, factors)
        torch._foreach_addcmul_(weights, directions, sizes, value=-1)
        return
    wide = [weight.to(sizes[0].dtype) for weight in weights]
    apply_update(wide, directions, sizes, factors)
    torch._foreach_copy_(weights, wide)
