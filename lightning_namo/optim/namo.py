"""NAMO and NAMO-D; each trains parameters that are not matrices with AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from lightning_namo.arguments import POSITIVE, Range, check, choice, is_number, or_none
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.formulas import (
    Decay,
    HyperParameters,
    adam_correction,
    capped,
    decay_factor,
    ratio,
    shape_factor,
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


class NAMO(_AdaptiveScale):
    r"""Muon's orthogonalized momentum, scaled by one adaptive number per matrix.

    ::

        M <- M + (1 - mu1)(G - M);   N = (1 - mu1) G + mu1 M  (nesterov) or M;   O = polar(N)
        v <- mu2 v + (1 - mu2) ||G||_F^2
        a  = lr sqrt(1 - mu2^t) / (1 - mu1^t) ||N||_F / (sqrt(v) + eps)
        W <- W (1 - weight_decay min(a, max_step)) - min(a s, max_step) O,   s = shape_scale sqrt(max(m, n))

    The defaults are the official code's; ``nesterov=False, shape_scale=None, max_step=None`` is the paper's box.

    Args:
        params: What `split_parameters` returns, or torch's usual iterables and groups; a group with
            ``orthogonalize=False`` gets AdamW.
        lr: Learning rate of the matrices; about nine times Muon's (the adaptive number is small in noise).
        weight_decay: lambda, decoupled; coupled to the adaptive step unless ``decay="lr"``.
        momentum: mu1, in [0, 1); ``momentum**2 < beta2`` keeps the adaptive number bounded.
        beta2: mu2, in [0, 1).
        eps: Added to sqrt(v), in units of the gradient's Frobenius norm.
        nesterov: Whether N looks ahead.
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
        "Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum", arXiv 2602.17080, algorithm 1.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = NAMO([layer.weight], lr=0.01)
    """

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
        G_sq, N_sq = yield Sum(x.square_sum(x.grad), x.square_sum(x.look_ahead(h)))
        x.v = h.beta2 * x.v + (1 - h.beta2) * G_sq
        a = h.lr * adam_correction(x.step, h) * ratio(N_sq.sqrt(), x.v.sqrt() + h.eps)
        O = yield Polar(x.advance(h))
        s = shape_factor(x.shape, h.shape_scale)
        x.apply(O, step_size=capped(a * s, h.max_step), decay=decay_factor(a, h))


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
        r = ratio(N_sq.sqrt(), x.v.sqrt() + h.eps)
        if h.clamp:
            mean = r.mean(dim=-1, keepdim=True)
            r = r.clamp(min=h.clamp * mean, max=mean / h.clamp)
        a = h.lr * adam_correction(x.step, h) * r
        O = yield Polar(x.advance(h))
        s = shape_factor(x.shape, h.shape_scale)
        x.apply(O, step_size=capped(a * s, h.max_step), decay=decay_factor(a, h).clamp(min=0.0))
