"""NAMO and NAMO-D; each trains parameters that are not matrices with AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor

from lightning_namo.arguments import POSITIVE, Range, check, choice, is_number, or_none
from lightning_namo.optim.elements import Elements
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.formulas import (
    Decay,
    HyperParameters,
    Order,
    adam_correction,
    bias_correction,
    capped,
    decay_factor,
    ratio,
    shape_factor,
    signal_fraction,
)
from lightning_namo.optim.groups import Params, hyper_parameters
from lightning_namo.optim.ranges import MomentumDtype
from lightning_namo.optim.rule import Matrices, Polar, Rule, Sum
from lightning_namo.polar.coefficients import Coefficients
from lightning_namo.polar.orthogonalize import Method


class _AdaptiveScale(OrthogonalizedOptimizer):
    """What NAMO and NAMO-D share: ranges of their hyper-parameters."""

    ranges: ClassVar[Mapping[str, Range]] = {"max_step": or_none(POSITIVE), "decay": choice(*get_args(Decay))}

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        momentum, beta2 = group["momentum"], group["beta2"]
        check(
            momentum == 0 or momentum**2 < beta2,
            type(self).__name__,
            "beta2",
            f"above momentum^2 = {momentum**2:g} (else the adaptive scale is unbounded)",
            beta2,
        )

    _least_decay: ClassVar[float | None] = None  # what the weight is multiplied by at least

    def _apply(
        self, x: Matrices, h: HyperParameters, O: Elements, correction: Tensor, r: Tensor, readings: dict[str, Any]
    ) -> None:
        """``a = lr correction r``: step and decay, within their caps, and readings of them."""
        a, s = h.lr * correction * r, shape_factor(x.shape, h.shape_scale)
        step_size, decay = capped(a * s, h.max_step), decay_factor(a, h)
        if self._least_decay is not None:
            decay = decay.clamp(min=self._least_decay)
        has_decay = h.decay == "adaptive" and (isinstance(h.weight_decay, Tensor) or h.weight_decay > 0)
        largest = max(s, 1.0) if has_decay else s  # what a is multiplied by before it meets the cap
        x.report(
            step_scale=lambda: correction * r,
            effective_step=step_size,
            effective_decay=lambda: 1 - decay,
            at_cap=lambda: (a * largest > (h.max_step or math.inf)).float().mean(dim=-1, keepdim=True),
            **readings,
        )
        x.apply(O, step_size, decay)


class NAMO(_AdaptiveScale):
    r"""Muon's orthogonalized momentum, scaled by one adaptive number per matrix.

    ::

        M <- M + (1 - mu1)(G - M);   N = (1 - mu1) G + mu1 M  (nesterov) or M;   O = polar(N)
        v <- mu2 v + (1 - mu2) ||G||_F^2
        a  = lr sqrt(1 - mu2^t) / (1 - mu1^t) ||N||_F / (sqrt(v) + eps)
        W <- W (1 - weight_decay min(a, max_step)) - min(a s, max_step) O,   s = shape_scale sqrt(max(m, n))

    The defaults are the official code's; ``nesterov=False, shape_scale=None, max_step=None`` is the algorithm as the
    paper prints it.

    Momentum comes before the polar factor, ``order="pre"``. The other orders, as `Muon`'s, are there to compare. Their
    adaptive number is ours, since the papers have none: "none" orthogonalizes G, and takes ``||G||_F`` for
    ``||N||_F`` and mu1 = 0 for its correction; "post" averages polar factors, and takes the norm of their average
    relative to that of a polar factor, ``a = lr / (1 - mu1^t) ||N||_F / sqrt(min(m, n))``, which is 1 for a constant
    gradient and small in noise as that of "pre", and whatever the size of the gradient.

    Args:
        params: What `split_parameters` returns, or torch's usual iterables and groups; a group with
            ``orthogonalize=False`` gets AdamW.
        lr: Learning rate of the matrices; about nine times Muon's (the adaptive number is small in noise).
        weight_decay: lambda, decoupled; coupled to the adaptive step unless ``decay="lr"``.
        momentum: mu1, in [0, 1); ``momentum**2 < beta2`` keeps the adaptive number bounded.
        beta2: mu2, in [0, 1).
        eps: Added to sqrt(v), in units of the gradient's Frobenius norm.
        nesterov: Whether N looks ahead.
        order: Whether momentum comes before the polar factor ("pre"), after it ("post"), or not at all ("none").
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic", "polar_express", or triples (a, b, c).
        orthogonalizer: "newton_schulz" (bfloat16 or float32: `iteration_dtype`) or "svd" (exact).
        shape_scale: s = shape_scale sqrt(max(m, n)) on the update; None: s = 1.
        max_step: Cap of both a and a s; None: no cap.
        decay: "adaptive" (1 - weight_decay a) or "lr" (1 - lr weight_decay, Muon's).
        adamw_lr: Learning rate of the AdamW groups; None: ``lr``, as in the official runs.
        adamw_betas: AdamW's betas.
        adamw_eps: AdamW's eps.
        adamw_weight_decay: AdamW's weight decay.
        momentum_dtype: Of the momentum of matrices, "float32" or "bfloat16"; None: the parameter's.

    Raises:
        ValueError: For values out of range, parameters that are not matrices, or no matrix at all.

    References:
        "Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum", arXiv 2602.17080, algorithm 1;
        orders: "Denoise First, Orthogonalize Later", arXiv 2606.03899.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = NAMO([layer.weight], lr=0.01)
    """

    ranges: ClassVar[Mapping[str, Range]] = {"order": choice(*get_args(Order))}
    fixed: ClassVar[Mapping[str, Any]] = {"order": "pre"}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.99,
        eps: float = 1e-8,
        nesterov: bool = True,
        *,
        order: Order = "pre",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: float | None = 0.2,
        max_step: float | None = 1.0,
        decay: Decay = "adaptive",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        super().__init__(params, hyper_parameters(locals()))

    state: Any = {"v": "matrix"}

    def rule(self, x: Matrices, h: HyperParameters) -> Rule:
        """Algorithm 1."""
        if h.order != "pre":
            return (yield from self._other_order(x, h))
        G_sq, N_sq = yield Sum(x.square_sum(x.grad), x.square_sum(x.look_ahead(h)))
        x.v = h.beta2 * x.v + (1 - h.beta2) * G_sq
        correction, r = adam_correction(x.step, h), ratio(N_sq.sqrt(), x.v.sqrt() + h.eps)
        O = yield Polar(x.advance(h))
        readings = {"signal_fraction": lambda: signal_fraction(N_sq, x.v, x.step, h)}
        self._apply(x, h, O, correction, r, readings)

    def _other_order(self, x: Matrices, h: HyperParameters) -> Rule:
        """Without momentum, or with the momentum of polar factors."""
        (G_sq,) = yield Sum(x.square_sum(x.grad))
        x.v = h.beta2 * x.v + (1 - h.beta2) * G_sq
        O = yield Polar(x.grad)
        correction, r = bias_correction(h.beta2, x.step).sqrt(), ratio(G_sq.sqrt(), x.v.sqrt() + h.eps)
        if h.order == "post":
            O = x.advance(h, toward=O).clone()
            (O_sq,) = yield Sum(x.square_sum(O))
            correction, r = 1 / bias_correction(h.momentum, x.step), (O_sq / min(x.shape)).sqrt()
        self._apply(x, h, O, correction, r, {})


class NAMOD(_AdaptiveScale):
    r"""Muon's orthogonalized momentum, scaled by one clamped adaptive number per column (input feature).

    ::

        M, N, O as NAMO's
        v_j <- mu2 v_j + (1 - mu2) ||G[:, j]||^2
        r_j  = ||N[:, j]|| / (sqrt(v_j) + eps), clipped to [c mean(r), mean(r) / c]
        a_j  = lr sqrt(1 - mu2^t) / (1 - mu1^t) r_j
        W[:, j] <- W[:, j] max(0, 1 - weight_decay min(a_j, max_step)) - min(a_j s, max_step) O[:, j]

    Args:
        params: As `NAMO`'s.
        lr: Learning rate of the matrices.
        weight_decay: lambda, decoupled; coupled to the adaptive step unless ``decay="lr"``.
        momentum: mu1, in [0, 1); ``momentum**2 < beta2`` keeps the adaptive numbers bounded.
        beta2: mu2, in [0, 1).
        eps: Added to sqrt(v_j), in units of a gradient column's norm.
        nesterov: Whether N looks ahead.
        clamp: c in (0, 1]: 1 scales all columns alike; None or 0: no clamp.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic", "polar_express", or triples (a, b, c).
        orthogonalizer: "newton_schulz" (bfloat16 or float32: `iteration_dtype`) or "svd" (exact).
        shape_scale: s = shape_scale sqrt(max(m, n)) on the update; None: s = 1.
        max_step: Cap of both a_j and a_j s; None: no cap.
        decay: "adaptive" (1 - weight_decay a_j) or "lr" (1 - lr weight_decay, Muon's); neither below 0.
        adamw_lr: Learning rate of the AdamW groups; None: ``lr``, as in the official runs.
        adamw_betas: AdamW's betas.
        adamw_eps: AdamW's eps.
        adamw_weight_decay: AdamW's weight decay.
        momentum_dtype: Of the momentum of matrices, "float32" or "bfloat16"; None: the parameter's.

    Raises:
        ValueError: For values out of range, parameters that are not matrices, or no matrix at all.

    References:
        "Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum", arXiv 2602.17080, algorithm 2.
    """

    _least_decay = 0.0
    ranges: ClassVar[Mapping[str, Range]] = {
        "clamp": Range(
            lambda value: value is None or (is_number(value) and 0 <= value <= 1), "in (0, 1], or None or 0 for none"
        ),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.99,
        eps: float = 1e-8,
        nesterov: bool = True,
        *,
        clamp: float | None = 0.1,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: float | None = 0.2,
        max_step: float | None = 1.0,
        decay: Decay = "adaptive",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        super().__init__(params, hyper_parameters(locals()))

    state: Any = {"v": "column"}

    def rule(self, x: Matrices, h: HyperParameters) -> Rule:
        """Algorithm 2."""
        G_sq, N_sq = yield Sum(x.column_square_sum(x.grad), x.column_square_sum(x.look_ahead(h)))
        x.v = h.beta2 * x.v + (1 - h.beta2) * G_sq
        readings = {"signal_fraction": lambda: signal_fraction(N_sq.sum(-1, True), x.v.sum(-1, True), x.step, h)}
        r = ratio(N_sq.sqrt(), x.v.sqrt() + h.eps)
        if h.clamp:
            free, mean = r, r.mean(dim=-1, keepdim=True)
            r = r.clamp(min=h.clamp * mean, max=mean / h.clamp)
            readings["at_lower_clamp"] = lambda: (free < h.clamp * mean).float().mean(dim=-1, keepdim=True)
            readings["at_upper_clamp"] = lambda: (free > mean / h.clamp).float().mean(dim=-1, keepdim=True)
        correction = adam_correction(x.step, h)
        O = yield Polar(x.advance(h))
        self._apply(x, h, O, correction, r, readings)
