"""Muon and AdaMuon; each trains parameters that are not matrices with AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_namo import types
from lightning_namo.optim import formulas
from lightning_namo.optim.engine import Entry, OrthogonalizedOptimizer, Update
from lightning_namo.optim.groups import Params, adamw_defaults, statistics_dtype
from lightning_namo.optim.ranges import MomentumDtype
from lightning_namo.polar.coefficients import Coefficients
from lightning_namo.polar.orthogonalize import Method
from lightning_namo.sharding.exchange import Exchange, Stacks
from lightning_namo.sharding.layout import Layout
from lightning_namo.sharding.local import local_tensor, stack, unstack


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
        lr: types.NonNegativeFloat = 1e-3,
        weight_decay: types.NonNegativeFloat = 0.1,
        momentum: types.HalfOpenUnit = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: types.PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: types.PositiveFloat | None = 0.2,
        adamw_lr: types.NonNegativeFloat | None = None,
        adamw_betas: tuple[types.HalfOpenUnit, types.HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: types.NonNegativeFloat = 1e-8,
        adamw_weight_decay: types.NonNegativeFloat = 0.0,
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
        super().__init__(params, matrix, adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))


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
        lr: types.NonNegativeFloat = 1e-3,
        weight_decay: types.NonNegativeFloat = 0.1,
        momentum: types.HalfOpenUnit = 0.95,
        beta2: types.HalfOpenUnit = 0.95,
        eps: types.NonNegativeFloat = 1e-8,
        nesterov: bool = True,
        *,
        ns_steps: types.PositiveInt = 5,
        ns_coefficients: Coefficients = "quintic",
        orthogonalizer: Method = "newton_schulz",
        shape_scale: types.PositiveFloat | None = 0.2,
        adamw_lr: types.NonNegativeFloat | None = None,
        adamw_betas: tuple[types.HalfOpenUnit, types.HalfOpenUnit] = (0.9, 0.95),
        adamw_eps: types.NonNegativeFloat = 1e-8,
        adamw_weight_decay: types.NonNegativeFloat = 0.0,
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
        super().__init__(params, matrix, adamw_defaults(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay))

    def _extra_state(self, parameter: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(parameter, dtype=dtype)}

    def _shape_factor(self, shape: tuple[int, int], shape_scale: float | None) -> float:
        return formulas.adamuon_shape_factor(shape, shape_scale)

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
            direction, new_v = formulas.adamuon_direction(ortho.view(v.shape), v, **keys)
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
            update.size = formulas.adamuon_step_size(direction_sq, norm=update.size, eps=eps)
        super()._finish(entries, exchange, directions, updates)
