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
from typing import Literal

import torch
from torch import Tensor

Decay = Literal["adaptive", "lr"]


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
        nesterov: Whether to look ahead (official code) or not (the paper's box).
        out: Where to write N.
    """
    return torch.lerp(buffer, grad, 1 - momentum**2 if nesterov else 1 - momentum, out=out)


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


def namo_step_size(
    grad_sq: Tensor,
    direction_sq: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    lr: float,
    momentum: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """NAMO's adaptive step size, one number per matrix.

    ``v <- mu2 v + (1 - mu2) ||G||_F^2``; ``a = lr sqrt(1 - mu2^t) / (1 - mu1^t + 1e-12) ||N||_F / (sqrt(v) + eps)``.

    Args:
        grad_sq: ``||G||_F^2``, shape (...).
        direction_sq: ``||N||_F^2``, shape (...).
        v: Second moment before this step, shape (...).
        step: t, the number of this step, counted from 1.
        lr: Learning rate.
        momentum: mu1.
        beta2: mu2.
        eps: Added to ``sqrt(v)``, in units of the gradient's norm.

    Returns:
        The step size a and the new v, both of shape (...). A zero second moment gives a step size of zero.
    """
    v = beta2 * v + (1 - beta2) * grad_sq
    ratio = _ratio(direction_sq, v, eps)
    return lr * _adam_correction(step, momentum, beta2) * ratio, v


def namo_d_step_size(
    grad_sq: Tensor,
    direction_sq: Tensor,
    v: Tensor,
    *,
    step: Tensor,
    lr: float,
    momentum: float,
    beta2: float,
    eps: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """NAMO-D's adaptive step sizes, one number per column.

    As `namo_step_size` column by column; then ``r_j <- clip(r_j, c mean(r), mean(r) / c)`` keeps the columns' ratios
    within a factor of ``1 / c`` of their mean.

    Args:
        grad_sq: ``||G[:, j]||^2``, shape (..., n).
        direction_sq: ``||N[:, j]||^2``, shape (..., n).
        v: Second moments before this step, shape (..., n).
        step: t, the number of this step, counted from 1; broadcasts against (..., n).
        lr: Learning rate.
        momentum: mu1.
        beta2: mu2.
        eps: Added to ``sqrt(v)``, in units of a gradient column's norm.
        clamp: c in (0, 1]; None or 0 leaves the ratios alone.

    Returns:
        The step sizes and the new v, both of shape (..., n).
    """
    v = beta2 * v + (1 - beta2) * grad_sq
    ratio = _ratio(direction_sq, v, eps)
    if clamp:
        mean = ratio.mean(dim=-1, keepdim=True)
        ratio = ratio.clamp(min=clamp * mean, max=mean / clamp)
    return lr * _adam_correction(step, momentum, beta2) * ratio, v


def _ratio(direction_sq: Tensor, v: Tensor, eps: float) -> Tensor:
    """``||N|| / (sqrt(v) + eps)``, and 0 where nothing but zero gradients came."""
    denominator = v.sqrt() + eps
    return torch.where(denominator > 0, direction_sq.sqrt() / denominator, 0.0)


def _adam_correction(step: Tensor, momentum: float, beta2: float) -> Tensor:
    """Adam's bias correction as the official code has it, Nesterov or not."""
    return bias_correction(beta2, step).sqrt() / (bias_correction(momentum, step) + 1e-12)


def adamuon_direction(ortho: Tensor, v: Tensor, *, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """AdaMuon's elementwise adaptive direction.

    ``V <- beta V + (1 - beta) O^2``; ``U = O / (sqrt(V) + eps)``.

    Args:
        ortho: O, the polar factor of ``sign(N)``, any shape.
        v: V before this step, of the same shape.
        beta2: beta.
        eps: Added to ``sqrt(V)``.

    Returns:
        U and the new V, of the same shape.
    """
    ortho = ortho.to(v.dtype)
    v = torch.lerp(v, ortho.square(), 1 - beta2)
    denominator = v.sqrt() + eps
    return torch.where(denominator > 0, ortho / denominator, 0.0), v


def adamuon_step_size(direction_sq: Tensor, *, norm: Tensor, eps: float) -> Tensor:
    """AdaMuon's step size ``lr * shape_scale * sqrt(m n) / (||U||_F + eps)``: the update's RMS is shape_scale * lr.

    Args:
        direction_sq: ``||U||_F^2``, shape (...).
        norm: Of the update, lr times `adamuon_shape_factor`, shape (...).
        eps: Added to the norm of U.
    """
    denominator = direction_sq.sqrt() + eps
    return torch.where(denominator > 0, norm / denominator, 0.0)


def adamuon_shape_factor(shape: tuple[int, int], shape_scale: float | None) -> float:
    """``shape_scale * sqrt(m n)``, the norm of an update whose RMS is shape_scale; 0.2 is Adam's, None: 1."""
    return (1.0 if shape_scale is None else shape_scale) * math.sqrt(math.prod(shape))


def shape_factor(shape: tuple[int, int], shape_scale: float | None) -> float:
    """``shape_scale * sqrt(max(m, n))``, which gives an orthogonal update Adam's RMS at 0.2; None: 1 (NAMO's paper)."""
    return 1.0 if shape_scale is None else shape_scale * math.sqrt(max(shape))


def decay_factor(
    step_size: Tensor, *, lr: float, weight_decay: float, max_step: float | None, decay: Decay, floor: bool
) -> Tensor:
    """What the weight is multiplied by: ``1 - lambda min(a, max_step)`` ("adaptive") or ``1 - lr lambda`` ("lr").

    Args:
        step_size: a, of any shape.
        lr: Learning rate.
        weight_decay: lambda.
        max_step: Cap on the step size; None: no cap (the paper's box).
        decay: "adaptive" couples the decay to a (NAMO), "lr" to the learning rate (Muon).
        floor: Whether the factor stays at or above zero (NAMO-D's official code).
    """
    if decay == "lr":
        factor = torch.ones_like(step_size) - lr * weight_decay
    else:
        factor = 1 - weight_decay * (step_size if max_step is None else step_size.clamp(max=max_step))
    return factor.clamp(min=0.0) if floor else factor


def update_size(step_size: Tensor, factor: Tensor | float, *, max_step: float | None) -> Tensor:
    """What the direction is multiplied by: ``min(a s, max_step)``, with the shape factor s."""
    size = step_size * factor
    return size if max_step is None else size.clamp(max=max_step)


def apply_update(weight: Tensor, direction: Tensor, size: Tensor, factor: Tensor) -> None:
    """``W <- factor W - size O`` in place, in at least float32, rounded once.

    Args:
        weight: W, any shape; updated in place.
        direction: O (or AdaMuon's U), of the same shape.
        size: Of `update_size`; broadcasts against the weight.
        factor: Of `decay_factor`; broadcasts against the weight.
    """
    if weight.dtype == size.dtype:
        weight.mul_(factor).addcmul_(direction.to(weight.dtype), size, value=-1)
    else:
        weight.copy_((weight.to(size.dtype) * factor).addcmul_(direction.to(size.dtype), size, value=-1))
