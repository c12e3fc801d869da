"""NorMuon as an example of a rule: `lightning-namo fit --optim.optimizer own_rule.NorMuon`, from this folder."""

from __future__ import annotations

from typing import Any

from lightning_namo.optim import OrthogonalizedOptimizer, Polar, Sum


class NorMuon(OrthogonalizedOptimizer):
    """Muon with a second moment of the rows (output features) of its polar factors (arXiv 2510.05491).

    v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2;   U = O / (sqrt(v) + eps), row by row
    W   <- W (1 - lr weight_decay) - lr 0.2 sqrt(m n) / (||U||_F + eps) U
    """

    state: Any = {"v": "row"}  # one number for each row of each matrix

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
    ) -> None:
        keys = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": True}
        super().__init__(params, keys | {"beta2": beta2, "eps": eps})

    def rule(self, x: Any, h: Any) -> Any:
        O = (yield Polar(x.advance(h))).to(x.v.dtype)
        (squares,) = yield Sum(x.row_square_sum(O))
        x.v = h.beta2 * x.v + (1 - h.beta2) * squares / x.shape[1]
        U = O * x.spread(1 / (x.v.sqrt() + h.eps))
        (norm_sq,) = yield Sum(x.square_sum(U))
        size = h.lr * 0.2 * (x.shape[0] * x.shape[1]) ** 0.5 / (norm_sq.sqrt() + h.eps)
        x.apply(U, step_size=size, decay=1 - h.lr * h.weight_decay)
