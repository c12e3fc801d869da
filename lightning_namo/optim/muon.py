"""Muon and AdaMuon; each trains parameters that are not matrices with AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_namo import types
from lightning_namo.optim import formulas
from lightning_namo.optim.engine import MatrixParameter, OrthogonalizedOptimizer, Update
from lightning_namo.optim.groups import Params, hyper_parameters
from lightning_namo.optim.ranges import MomentumDtype
from lightning_namo.optim.state import statistics_dtype
from lightning_namo.polar.coefficients import Coefficients
from lightning_namo.polar.orthogonalize import Method
from lightning_namo.sharding.exchange import Exchange, StackedTensors
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
        ValueError: For values out of range, parameters that are not matrices, or no matrix at all.

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
        super().__init__(params, hyper_parameters(locals()))


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
        super().__init__(params, hyper_parameters(locals()))

    def _extra_state(self, parameter: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"v": torch.zeros_like(parameter, dtype=dtype)}

    def _shape_factor(self, shape: tuple[int, int], shape_scale: float | None) -> float:
        return formulas.adamuon_shape_factor(shape, shape_scale)

    def _to_orthogonalize(self, direction: Tensor) -> Tensor:
        return direction.sign_()

    def _apply(
        self,
        parameters: list[MatrixParameter],
        exchange: Exchange,
        bucket: StackedTensors,
        updates: dict[tuple[int, ...], Update],
    ) -> None:
        """Replace O by U and the step size by the one that the norm of U over all ranks gives."""
        directions, partials = [], []
        for indices, ortho in bucket:
            first = parameters[indices[0]]
            vs = [local_tensor(self.state[parameters[i].tensor]["v"]) for i in indices]
            v, keys = stack(vs, exchange.workspace), {key: first.group[key] for key in ("beta2", "eps")}
            direction, new_v = formulas.adamuon_direction(ortho.view(v.shape), v, **keys)
            v.copy_(torch.where(updates[indices].valid.view(-1, *(1 for _ in vs[0].shape)), new_v, v))
            unstack(v, vs)
            directions.append((indices, direction))
            norm_sq = first.layout.sums_of_squares(direction, False, statistics_dtype(first.tensor))
            counts = exchange.is_primary_replica(indices[0])
            partials.append((norm_sq if counts else torch.zeros_like(norm_sq)).flatten())
        if not partials:
            return
        totals = torch.split(exchange.sum(torch.cat(partials)), [part.numel() for part in partials])
        for (indices, _), total in zip(bucket, totals, strict=True):
            update, eps = updates[indices], parameters[indices[0]].group["eps"]
            direction_sq = total.to(update.size.dtype).view(update.size.shape)
            update.size = formulas.adamuon_step_size(direction_sq, norm=update.size, eps=eps)
        super()._apply(parameters, exchange, directions, updates)
