"""Muon and AdaMuon; each trains parameters that are not matrices with AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from lightning_namo.arguments import Range, choice
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.formulas import HyperParameters, Order, ratio, rms_factor, shape_factor
from lightning_namo.optim.groups import Params, hyper_parameters
from lightning_namo.optim.ranges import MomentumDtype
from lightning_namo.optim.rule import Matrices, Polar, Rule, Sum
from lightning_namo.polar.coefficients import Coefficients
from lightning_namo.polar.orthogonalize import Method


class Muon(OrthogonalizedOptimizer):
    r"""Orthogonalized momentum: ``W <- W (1 - lr weight_decay) - lr s O``, with M, N, O as `NAMO`'s.

    Equals ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` to bfloat16 rounding.

    Orthogonalized is the momentum, ``order="pre"``. The other orders are there to compare: "none" orthogonalizes the
    gradient, ``O = polar(G)``, and keeps no momentum; "post" averages polar factors,
    ``M <- M + (1 - mu)(polar(G) - M)``, and steps along N. A checkpoint goes on in its own order only: the momentum of
    "post" has another unit.

    Args:
        params: As `NAMO`'s.
        lr: Learning rate of the matrices; with ``shape_scale=0.2`` AdamW's is a good first choice.
        weight_decay: lambda, decoupled, times the learning rate.
        momentum: Decay of the gradient's average, in [0, 1).
        nesterov: Whether N looks ahead.
        order: Whether momentum comes before the polar factor ("pre"), after it ("post"), or not at all ("none").
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic", "polar_express", or triples (a, b, c).
        orthogonalizer: "newton_schulz" (bfloat16 or float32: `iteration_dtype`) or "svd" (exact).
        shape_scale: s = shape_scale sqrt(max(m, n)), which at 0.2 gives the update AdamW's RMS; None: s = 1.
        adamw_lr: Learning rate of the AdamW groups; None: ``lr``.
        adamw_betas: AdamW's betas.
        adamw_eps: AdamW's eps.
        adamw_weight_decay: AdamW's weight decay.
        momentum_dtype: Of the momentum of matrices, "float32" or "bfloat16"; None: the parameter's.

    Raises:
        ValueError: For values out of range, parameters that are not matrices, or no matrix at all.

    References:
        Keller Jordan, kellerjordan.github.io/posts/muon; shape factor: "Muon is Scalable for LLM Training",
        arXiv 2502.16982; orders: "Denoise First, Orthogonalize Later", arXiv 2606.03899.
    """

    ranges: ClassVar[Mapping[str, Range]] = {"order": choice(*get_args(Order))}
    fixed: ClassVar[Mapping[str, Any]] = {"order": "pre"}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        order: Order = "pre",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: float | None = 0.2,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        super().__init__(params, hyper_parameters(locals()))

    def rule(self, x: Matrices, h: HyperParameters) -> Rule:
        """One step."""
        O = yield Polar(x.advance(h) if h.order == "pre" else x.grad)
        if h.order == "post":
            O = x.advance(h, toward=O)
        step_size = h.lr * shape_factor(x.shape, h.shape_scale)
        x.report(effective_step=step_size, effective_decay=lambda: h.lr * h.weight_decay)
        x.apply(O, step_size, decay=1 - h.lr * h.weight_decay)


class AdaMuon(OrthogonalizedOptimizer):
    r"""Muon with an elementwise second moment of the orthogonalized sign of the momentum.

    ::

        M, N as NAMO's;   O = polar(sign(N));   V <- beta V + (1 - beta) O^2;   U = O / (sqrt(V) + eps)
        W <- W (1 - lr weight_decay) - lr shape_scale sqrt(m n) / (||U||_F + eps) U

    so that the update's RMS is ``shape_scale * lr`` at every step.

    Args:
        params: As `NAMO`'s.
        lr: Learning rate of the matrices.
        weight_decay: lambda, decoupled, times the learning rate.
        momentum: Decay of the gradient's average, in [0, 1).
        beta2: beta, in [0, 1).
        eps: Added to sqrt(V) and to the norm of U.
        nesterov: Whether N looks ahead (official code) or not (paper).
        ns_steps: Newton-Schulz steps.
        ns_coefficients: "quintic", "polar_express", or triples (a, b, c).
        orthogonalizer: "newton_schulz" (bfloat16 or float32: `iteration_dtype`) or "svd" (exact).
        shape_scale: RMS of the update in units of lr; 0.2 is AdamW's. None: 1.
        adamw_lr: Learning rate of the AdamW groups; None: ``lr``.
        adamw_betas: AdamW's betas.
        adamw_eps: AdamW's eps.
        adamw_weight_decay: AdamW's weight decay.
        momentum_dtype: Of the momentum of matrices, "float32" or "bfloat16"; None: the parameter's.

    Raises:
        ValueError: For values out of range, parameters that are not matrices, or no matrix at all.

    References:
        "AdaMuon: Adaptive Muon Optimizer", arXiv 2507.11005.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: float | None = 0.2,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        super().__init__(params, hyper_parameters(locals()))

    state: Any = {"v": "element"}

    def rule(self, x: Matrices, h: HyperParameters) -> Rule:
        """One step."""
        O = (yield Polar(x.advance(h).sign())).to(x.v.dtype)
        x.v = x.v.lerp(O.square(), 1 - h.beta2)
        U = ratio(O, x.v.sqrt() + h.eps)
        (U_sq,) = yield Sum(x.square_sum(U))
        norm = h.lr * rms_factor(x.shape, h.shape_scale)
        step_size = ratio(norm, U_sq.sqrt() + h.eps)
        x.report(effective_step=step_size, effective_decay=lambda: h.lr * h.weight_decay)
        x.apply(U, step_size, decay=1 - h.lr * h.weight_decay)
