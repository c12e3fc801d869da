"""A rule that asks for everything: two polar factors, sums before and after each, states of all four kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim import OrthogonalizedOptimizer, Polar, Sum


def power_of_two(number: Tensor) -> Tensor:
    """Rounded so that the rounding of sums, another one for each layout, does not reach what is orthogonalized."""
    return torch.exp2(torch.log2(number + 1e-3).round())


class TwoRounds(OrthogonalizedOptimizer):
    state: Any = {"norm": "matrix", "columns": "column", "rows": "row", "average": "element"}

    def __init__(self, params: Any, lr: float = 0.01, momentum: float = 0.9, **keys: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "momentum": momentum, "nesterov": True, **keys})

    def rule(self, x: Any, h: Any) -> Any:
        G_sq, W_columns = yield Sum(x.square_sum(x.grad), x.column_square_sum(x.weight))
        x.norm = 0.5 * x.norm + G_sq
        x.columns = x.columns - W_columns  # below 0
        (N_rows,) = yield Sum(x.row_square_sum(x.look_ahead(h)))
        x.rows = 0.9 * x.rows + N_rows
        O = (yield Polar(x.advance(h))).to(x.average.dtype)
        x.average = x.average.lerp(O, 0.1)
        x.advance(h, toward=O)
        O_sq, A_columns = yield Sum(x.square_sum(O), x.column_square_sum(x.average))
        rows = x.spread(power_of_two(x.rows / (x.norm + 1e-3)).clamp(0.5, 2.0))
        U = (yield Polar(O * rows + x.average)).to(O.dtype)
        (U_sq,) = yield Sum(x.square_sum(U * x.spread(1 + A_columns)))
        x.apply(U - 0.1 * x.weight.to(U.dtype), h.lr / (1 + x.columns.abs()), decay=1 - h.lr * h.weight_decay)
        x.apply(O, h.lr * O_sq / (1 + U_sq) / x.step)
