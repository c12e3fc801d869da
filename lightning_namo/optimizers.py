"""NAMO, NAMO-D, Muon and AdaMuon; each trains what is no hidden matrix with AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lightning_namo import rules
from lightning_namo.base import Entry, OrthogonalizedOptimizer, Update
from lightning_namo.exchange import Exchange, Stacks
from lightning_namo.grouped import Params, statistics_dtype
from lightning_namo.orthogonalize import Coefficients, Method
from lightning_namo.ranges import POSITIVE_OR_NONE, RANGES, MomentumDtype, Range, check, choice, is_number
from lightning_namo.regions import Layout, local_tensor, stack, unstack
from lightning_namo.rules import Decay
from lightning_namo.types import (
    ClosedUnitInterval,
    HalfOpenUnit,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)


class _AdaptiveScale(OrthogonalizedOptimizer):
    """What NAMO and NAMO-D share: v, the second moment of the gradient's norms, and its hyper-parameters."""

    adaptive = True
    ranges: ClassVar[Mapping[str, Range]] = {**RANGES, "max_step": POSITIVE_OR_NONE, "decay": choice(*get_args(Decay))}

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

    def _extra_state(self, parameter: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"v": torch.zeros(layout.statistic_shape(self.per_column), dtype=dtype, device=parameter.device)}

    def _start_from(self, states: list[dict[str, Any]]) -> None:
        """The momentum counts as the gradient of a first step."""
        entries, _, exchange = self._plan()
        parts = [
            entry.layout.sums_of_squares(
                local_tensor(state["momentum_buffer"])[None], self.per_column, state["v"].dtype
            )
            * exchange.contributes(i)
            for i, (entry, state) in enumerate(zip(entries, states, strict=True))
        ]
        totals = exchange.sum(torch.cat([part.flatten().to(exchange.device, torch.float64) for part in parts]))
        split = torch.split(totals, [part.numel() for part in parts])
        for entry, state, total in zip(entries, states, split, strict=True):
            gradient, gradient_sq = state["momentum_buffer"], total.view(state["v"].shape).to(state["v"].dtype)
            state["momentum_buffer"] = torch.zeros_like(gradient)
            rules.update_momentum(gradient, state["momentum_buffer"], momentum=entry.group["momentum"])
            first = torch.ones_like(state["step"])
            _, v = self._step_size(entry.group, gradient_sq, gradient_sq, state["v"], first)
            state["v"] = state["v"] if v is None else v
            state["step"] = (total.sum() > 0).to(first.dtype)


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
        lr: Learning rate of the matrices; about eight times Muon's (the adaptive number is small in noise).
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
        ValueError: For values out of range, parameters that are no matrices, or no matrix at all.

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
        lr: NonNegativeFloat = 0.01,
        weight_decay: NonNegativeFloat = 0.1,
        momentum: HalfOpenUnit = 0.95,
        beta2: HalfOpenUnit = 0.99,
        eps: NonNegativeFloat = 1e-8,
        nesterov: bool = True,
        *,
        ns_steps: PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: PositiveFloat | None = 0.2,
        max_step: PositiveFloat | None = 1.0,
        decay: Decay = "adaptive",
        adamw_lr: NonNegativeFloat | None = None,
        adamw_betas: tuple[HalfOpenUnit, HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: NonNegativeFloat = 1e-8,
        adamw_weight_decay: NonNegativeFloat = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        matrix = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "eps": eps,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "orthogonalizer": orthogonalizer,
            "shape_scale": shape_scale,
            "momentum_dtype": momentum_dtype,
            "max_step": max_step,
            "decay": decay,
        }
        super().__init__(params, matrix, _adamw(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))

    def _step_size(
        self, group: dict[str, Any], grad_sq: Tensor, direction_sq: Tensor, v: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        assert v is not None
        keys = {key: group[key] for key in ("lr", "momentum", "beta2", "eps")}
        return rules.namo_step_size(grad_sq, direction_sq, v, step=step, **keys)


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
        ValueError: For values out of range, parameters that are no matrices, or no matrix at all.

    References:
        "Adam Improves Muon: Adaptive Moment Estimation with Orthogonalized Momentum", arXiv 2602.17080, algorithm 2.
    """

    per_column = True
    ranges: ClassVar[Mapping[str, Range]] = {
        **_AdaptiveScale.ranges,
        "clamp": Range(
            lambda value: value is None or (is_number(value) and 0 <= value <= 1), "in (0, 1], or None or 0 for none"
        ),
    }

    def __init__(
        self,
        params: Params,
        lr: NonNegativeFloat = 0.01,
        weight_decay: NonNegativeFloat = 0.1,
        momentum: HalfOpenUnit = 0.95,
        beta2: HalfOpenUnit = 0.99,
        eps: NonNegativeFloat = 1e-8,
        nesterov: bool = True,
        *,
        clamp: ClosedUnitInterval | None = 0.1,
        ns_steps: PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: PositiveFloat | None = 0.2,
        max_step: PositiveFloat | None = 1.0,
        decay: Decay = "adaptive",
        adamw_lr: NonNegativeFloat | None = None,
        adamw_betas: tuple[HalfOpenUnit, HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: NonNegativeFloat = 1e-8,
        adamw_weight_decay: NonNegativeFloat = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        matrix = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "eps": eps,
            "nesterov": nesterov,
            "clamp": clamp,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "orthogonalizer": orthogonalizer,
            "shape_scale": shape_scale,
            "momentum_dtype": momentum_dtype,
            "max_step": max_step,
            "decay": decay,
        }
        super().__init__(params, matrix, _adamw(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))

    def _step_size(
        self, group: dict[str, Any], grad_sq: Tensor, direction_sq: Tensor, v: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        assert v is not None
        keys = {key: group[key] for key in ("lr", "momentum", "beta2", "eps", "clamp")}
        return rules.namo_d_step_size(grad_sq, direction_sq, v, step=step, **keys)


class Muon(OrthogonalizedOptimizer):
    r"""Orthogonalized momentum: ``W <- W (1 - lr weight_decay) - lr s O``, with M, N, O as `NAMO`'s.

    Equals ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` to bfloat16 rounding.

    Args:
        params: As `NAMO`'s.
        lr: Learning rate of the matrices; with ``shape_scale=0.2`` AdamW's is a good first choice.
        weight_decay: lambda, decoupled, times the learning rate.
        momentum: Decay of the gradient's average, in [0, 1).
        nesterov: Whether N looks ahead.
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
        ValueError: For values out of range, parameters that are no matrices, or no matrix at all.

    References:
        Keller Jordan, kellerjordan.github.io/posts/muon; shape factor: "Muon is Scalable for LLM Training",
        arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Params,
        lr: NonNegativeFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.1,
        momentum: HalfOpenUnit = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: PositiveFloat | None = 0.2,
        adamw_lr: NonNegativeFloat | None = None,
        adamw_betas: tuple[HalfOpenUnit, HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: NonNegativeFloat = 1e-8,
        adamw_weight_decay: NonNegativeFloat = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        matrix = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "orthogonalizer": orthogonalizer,
            "shape_scale": shape_scale,
            "momentum_dtype": momentum_dtype,
        }
        super().__init__(params, matrix, _adamw(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))


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
        ValueError: For values out of range, parameters that are no matrices, or no matrix at all.

    References:
        "AdaMuon: Adaptive Muon Optimizer", arXiv 2507.11005.
    """

    def __init__(
        self,
        params: Params,
        lr: NonNegativeFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.1,
        momentum: HalfOpenUnit = 0.95,
        beta2: HalfOpenUnit = 0.95,
        eps: NonNegativeFloat = 1e-8,
        nesterov: bool = True,
        *,
        ns_steps: PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: PositiveFloat | None = 0.2,
        adamw_lr: NonNegativeFloat | None = None,
        adamw_betas: tuple[HalfOpenUnit, HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: NonNegativeFloat = 1e-8,
        adamw_weight_decay: NonNegativeFloat = 0.0,
        momentum_dtype: MomentumDtype | None = None,
    ) -> None:
        matrix = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "eps": eps,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "orthogonalizer": orthogonalizer,
            "shape_scale": shape_scale,
            "momentum_dtype": momentum_dtype,
        }
        super().__init__(params, matrix, _adamw(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))

    def _extra_state(self, parameter: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(parameter, dtype=dtype)}

    def _shape_factor(self, shape: tuple[int, int], shape_scale: float | None) -> float:
        return rules.adamuon_shape_factor(shape, shape_scale)

    def _input(self, direction: Tensor) -> Tensor:
        return direction.sign_()

    def _finish(
        self,
        entries: list[Entry],
        exchange: Exchange,
        bucket: Stacks,
        updates: dict[tuple[int, ...], Update],
    ) -> None:
        """Replace O by U and the step size by the one that its norm over all ranks gives."""
        directions, partials = [], []
        for parcel, ortho in bucket:
            entry = entries[parcel[0]]
            vs = [local_tensor(self.state[entries[i].parameter]["v"]) for i in parcel]
            v, keys = stack(vs, exchange.workspace), {key: entry.group[key] for key in ("beta2", "eps")}
            direction, new_v = rules.adamuon_direction(ortho.view(v.shape), v, **keys)
            v.copy_(torch.where(updates[parcel].ok.view(-1, *(1 for _ in vs[0].shape)), new_v, v))
            unstack(v, vs)
            directions.append((parcel, direction))
            norm_sq = entry.layout.sums_of_squares(direction, False, statistics_dtype(entry.parameter))
            partials.append((norm_sq if exchange.contributes(parcel[0]) else torch.zeros_like(norm_sq)).flatten())
        if not partials:
            return
        totals = torch.split(exchange.sum(torch.cat(partials)), [part.numel() for part in partials])
        for (parcel, _), total in zip(bucket, totals, strict=True):
            update, eps = updates[parcel], entries[parcel[0]].group["eps"]
            direction_sq = total.to(update.size.dtype).view(update.size.shape)
            update.size = rules.adamuon_step_size(direction_sq, norm=update.size, eps=eps)
        super()._finish(entries, exchange, directions, updates)


def _adamw(lr: float | None, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
