"""Muon Hyperball as an example of a rule: `lightning-namo fit --optim.optimizer hyperball.MuonH`, from this folder."""

from __future__ import annotations

from typing import Any

import torch

from lightning_namo.optim import OrthogonalizedOptimizer, Polar, Sum


class MuonH(OrthogonalizedOptimizer):
    """Muon that holds the norms of a weight, R, and of its updates, lr R, in place of weight decay (arXiv 2606.16899).

    R = ||W_0||_F;   V = W - lr R O / ||O||_F;   W <- R V / ||V||_F          (norms are at least eps)
    """

    state: Any = {"radius": "matrix"}  # R, from the first step on

    def __init__(self, params: Any, lr: float = 0.01, momentum: float = 0.95, eps: float = 1e-8) -> None:
        keys = {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "nesterov": True}
        super().__init__(params, keys | {"eps": eps})

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        O_sq, W_sq = yield Sum(x.square_sum(O), x.square_sum(x.weight))
        x.radius = torch.where(x.step == 1, W_sq.sqrt(), x.radius)
        size = h.lr * x.radius / O_sq.sqrt().clamp(min=h.eps)
        (V_sq,) = yield Sum(x.square_sum(x.weight - x.spread(size) * O))
        scale = x.radius / V_sq.sqrt().clamp(min=h.eps)
        x.apply(O, step_size=scale * size, decay=scale)
