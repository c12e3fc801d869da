"""What a walk should have made of weights and state: tests/reference.py and torch's AdamW, in float64, in one process.

Beside each number runs a bound of what the package may have made of it by rounding: every operation's rounding at the
unit of the dtype that it is computed or stored in, carried through the formulas by intervals, and through the polar
factor by its perturbation bound. No constant is fitted: factors such as 4 or 8 count roundings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from tests import reference
from tests.helpers.rules import taken

Interval = tuple[Tensor, Tensor]
RULES: dict[str, Any] = {
    "NAMO": reference.namo,
    "NAMOD": reference.namo_d,
    "Muon": reference.muon,
    "AdaMuon": reference.adamuon,
    "NorMuon": reference.normuon,
    "MuonH": reference.muon_hyperball,
}


def unit(dtype: torch.dtype) -> float:
    """What rounding to a dtype changes at most, relative."""
    return torch.finfo(dtype).eps


def least(dtype: torch.dtype) -> float:
    """Below it a dtype loses digits, and the kernels of CPUs may flush to zero."""
    return torch.finfo(dtype).tiny


def square_interval(X: Tensor, e: Tensor) -> Tensor:
    """How far ``X^2`` may be off if X is by e."""
    return 2 * X.abs() * e + e * e


def quotient(X: Tensor, e: Tensor, v: Tensor, ev: Tensor, eps: float, u: float) -> Interval:
    """``|X| / (sqrt(v) + eps)`` from below and above, for X off by e and v by ev; 0 where both are exactly 0."""
    low = (X.abs() - e).clamp(min=0) / ((v + ev).sqrt() + eps)
    high = (X.abs() + e) / ((v - ev).clamp(min=0).sqrt() + eps)
    nothing = X.abs() + e == 0
    return (
        torch.where(nothing, 0.0, low * (1 - 8 * u)),
        torch.where(nothing, 0.0, high * (1 + 8 * u)),
    )


def normalized(X: Tensor, e: Tensor, d: Tensor, eps: float, u: float) -> tuple[Tensor, Tensor, Tensor]:
    """``Y = X / max(||X||, eps)``, and how far Y may be off in each element and in norm, for X off by e and d.

    In norm by d over the least divisor, as no two points come to lie further apart when they are projected onto a ball.
    """
    divisor, few = X.norm().clamp(min=eps), (X.numel() + 8) * u
    Y, low = X / divisor, (X.norm() - d).clamp(min=eps)
    off = (d / low).clamp(max=2)
    e = torch.minimum((e + Y.abs() * d) / low, off)
    return Y, e + few * (Y.abs() + e), off + few * (1 + off)


@dataclass
class Rounding:
    """The dtypes in which the package holds a parameter: their units."""

    weight: torch.dtype
    momentum: torch.dtype
    statistics: torch.dtype


class Polar:
    """The polar factor of the reference, cut where the package cuts, and how far the package's may be off."""

    def __init__(self, signs: bool) -> None:
        self.signs = signs  # N is a matrix of signs: AdaMuon's
        self.weight = torch.float64  # the dtype that N is sent in
        self.spread = torch.zeros(())  # how far N may be off, elementwise
        self.before_sign = torch.zeros(())

    def __call__(self, N: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(N, full_matrices=False)
        cut = float(S[0]) * max(N.shape) * unit(torch.promote_types(self.weight, torch.float32))
        rank = int((cut < S).sum())
        self.factor = U[:, :rank] @ Vh[:rank]
        e = self.spread
        if self.signs:
            sure = bool(((self.before_sign.abs() > e) | ((self.before_sign == 0) & (e == 0))).all())
            e = torch.zeros_like(N)
            self.off = 0.0 if sure else inf
        else:
            self.off = 0.0
        distance = float(e.norm())
        noise = 2 * max(N.shape) * unit(torch.float64) * float(S[0])  # the SVDs' own backward errors
        touched = N.abs() + e > 0
        full = min(int(touched.any(dim=0).sum()), int(touched.any(dim=1).sum()))
        gap = float(S[rank - 1]) if rank else inf
        following = float(S[rank]) if rank < len(S) else 0.0
        agreed = gap - distance > cut * (1 + 1e-6) and (rank == full or following + distance < cut * (1 - 1e-6))
        # ||dO||_F <= (2 / (s + t) + 1 / max(s, t)) ||dN||_F with the smallest singular values s, t of both (Li 1995,
        # "New perturbation bounds for the unitary polar factor"); one more for the null space that is cut off.
        bound = 4 * (distance + noise) / (gap - distance - noise) if agreed and gap > distance + noise else inf
        self.off = min(max(bound, self.off), 2 * sqrt(max(full, 1)))
        return self.factor


class Matrix:
    """One true matrix: a generator of the reference, and the bounds beside it."""

    def __init__(self, W: Tensor, rule: str, hyper: dict[str, Any], lr: Tensor, weight_decay: Tensor) -> None:
        self.rule, self.hyper, self.lr, self.weight_decay = rule, hyper, lr, weight_decay
        keys = {"lam": weight_decay, "mu1": hyper["momentum"], "mu2": hyper.get("beta2"), "beta": hyper.get("beta2")}
        keys |= {key: hyper.get(key) for key in ("nesterov", "eps", "max_step", "decay", "shape_scale")}
        keys |= {"c": hyper.get("clamp") or 0.0}
        if rule == "AdaMuon":
            keys |= {"shape_scale": hyper["shape_scale"] or 1.0}
        self.polar = Polar(rule == "AdaMuon")
        self.W, self.eW = W, torch.zeros_like(W)
        self.M, self.eM = torch.zeros_like(W), torch.zeros_like(W)
        self.dW = torch.zeros((), dtype=W.dtype)  # MuonH's: how far W may be off in norm
        shapes = {"NAMO": (), "NAMOD": (W.size(1),), "AdaMuon": tuple(W.shape), "NorMuon": (W.size(0),), "MuonH": ()}
        shape = shapes.get(rule)
        self.v = None if shape is None else torch.zeros(shape, dtype=W.dtype)
        self.ev = None if shape is None else torch.zeros(shape, dtype=W.dtype)
        self.t = 0
        self.weights: Iterator[Tensor] = RULES[rule](
            W, self._gradients(), eta=lr, orth=self.polar, **taken(RULES[rule], keys)
        )

    def _gradients(self) -> Iterator[Tensor]:
        while True:
            yield self.G

    def step(self, G: Tensor, eG: Tensor, units: Rounding) -> None:
        """Take a step of the reference, and move the bounds."""
        mu, nesterov = self.hyper["momentum"], self.hyper["nesterov"]
        uw, um = unit(units.weight), unit(units.momentum)
        W = self.W
        self.G, self.t = G, self.t + 1
        size, averaged = self.M.abs() + G.abs(), self.M.abs() + (1 - mu) * G.abs()
        uc = unit(torch.promote_types(units.weight, units.momentum))
        fresh = mu * self.eM + (1 - mu) * eG + 4 * uc * averaged + (size > 0) * least(units.weight)
        self.M = mu * self.M + (1 - mu) * G
        N = mu * self.M + (1 - mu) * G if nesterov else self.M
        eN = (mu * fresh + (1 - mu) * eG if nesterov else fresh) + 4 * uc * size
        self.eM = fresh + um * self.M.abs()
        sent = eN + uw * N.abs()
        self.polar.weight, self.polar.spread, self.polar.before_sign = units.weight, sent, N
        self.W = next(self.weights)
        P, eP = self.polar.factor, torch.full_like(W, self.polar.off) + uw * self.polar.factor.abs()
        if self.rule in ("AdaMuon", "NorMuon"):
            self._adamuon(W, P, eP, units)
        elif self.rule == "MuonH":
            self._hyperball(W, P, eP, units)
        else:
            self._scaled(W, G, eG, N, eN, P, eP, units)

    def _statistic(self, X: Tensor, e: Tensor, us: float, tiny: float) -> tuple[Tensor, Tensor]:
        """``||X||^2``, of the matrix or of the columns, and its bound."""
        dim = 0 if self.rule == "NAMOD" else (0, 1)
        count = X.size(0) if self.rule == "NAMOD" else X.numel()
        total = X.square().sum(dim=dim)
        off = square_interval(X, e).sum(dim=dim)
        return total, off + (count + 8) * us * (total + off) + (total + off > 0) * count * tiny

    def _scaled(
        self, W: Tensor, G: Tensor, eG: Tensor, N: Tensor, eN: Tensor, P: Tensor, eP: Tensor, units: Rounding
    ) -> None:
        h, us, uw = self.hyper, unit(units.statistics), unit(units.weight)
        lr, lam, mu1 = float(self.lr), float(self.weight_decay), h["momentum"]
        if self.rule == "Muon":
            low = high = torch.tensor(lr, dtype=W.dtype)
        else:
            assert self.v is not None
            assert self.ev is not None
            mu2, eps, tiny = h["beta2"], h["eps"], least(units.statistics)
            grad_sq, off = self._statistic(G, eG, us, tiny)
            self.v = mu2 * self.v + (1 - mu2) * grad_sq
            self.ev = mu2 * self.ev + (1 - mu2) * off + 4 * us * self.v + (self.v > 0) * tiny
            norm_sq, off = self._statistic(N, eN, us, tiny)
            norm = norm_sq.sqrt()
            off = torch.maximum((norm_sq + off).sqrt() - norm, norm - (norm_sq - off).clamp(min=0).sqrt())
            low, high = quotient(norm, off, self.v, self.ev, eps, us)
            if self.rule == "NAMOD" and h["clamp"]:
                c, few = h["clamp"], (low.numel() + 8) * us
                means = low.mean() * (1 - few), high.mean() * (1 + few)
                low, high = (
                    torch.minimum(torch.maximum(r, c * m), m / c) for r, m in zip((low, high), means, strict=True)
                )
            correction = lr * sqrt(1 - mu2**self.t) / (1 - mu1**self.t)
            few = 16 * us + 1e-12 / (1 - mu1**self.t)  # the official code adds 1e-12 there
            low, high = low * correction * (1 - few), high * correction * (1 + few)
        cap = inf if h.get("max_step") is None else h["max_step"]
        s = reference.shape_factor(W, h["shape_scale"])
        sizes = [(a * s).clamp(max=cap) for a in (low, high)]
        if h.get("decay", "lr") == "lr":
            factors = [torch.ones_like(low) * (1 - lr * lam)] * 2
        else:
            factors = [1 - lam * a.clamp(max=cap) for a in (high, low)]
            if self.rule == "NAMOD":
                factors = [factor.clamp(min=0) for factor in factors]
        few = 4 * us
        size, e_size = sizes[1], sizes[1] - sizes[0] + few * sizes[1]
        factor, e_factor = (
            torch.maximum(factors[0].abs(), factors[1].abs()),
            factors[1] - factors[0] + few * (1 + lr * lam),
        )
        moved = (size + e_size) * (P.abs() + eP)
        kept = (factor + e_factor) * (W.abs() + self.eW)
        self.eW = (
            (factor + e_factor) * self.eW
            + e_factor * W.abs()
            + (size + e_size) * eP
            + e_size * P.abs()
            + 4 * uw * (moved + kept)
            + (moved + kept > 0) * least(units.weight)
        )

    def _adamuon(self, W: Tensor, P: Tensor, eP: Tensor, units: Rounding) -> None:
        assert self.v is not None
        assert self.ev is not None
        h, us, uw = self.hyper, unit(units.statistics), unit(units.weight)
        lr, lam, beta, eps = float(self.lr), float(self.weight_decay), h["beta2"], h["eps"]
        squares, off = P.square(), square_interval(P, eP)
        if self.rule == "NorMuon":
            squares, off = squares.mean(dim=1), off.mean(dim=1)
            off = off + (P.size(1) + 8) * us * (squares + off)
        self.v = beta * self.v + (1 - beta) * squares
        self.ev = beta * self.ev + (1 - beta) * off + 4 * us * self.v
        v, ev = (X.reshape(len(P), -1) for X in (self.v, self.ev))
        low, high = quotient(P, eP, v, ev, eps, us)
        U = P.abs() / (v.sqrt() + eps)
        eU = torch.where(P.abs() > eP, torch.maximum(high - U, U - low), high + U)
        eU = torch.where(high == 0, 0.0, eU)
        norm, off = U.norm(), eU.norm() + (U.numel() + 8) * us * U.norm()
        top = lr * (0.2 if self.rule == "NorMuon" else h["shape_scale"] or 1.0) * sqrt(W.numel())
        size = top / (norm + eps)
        worst = top / ((norm - off).clamp(min=0) + eps)
        e_size = torch.maximum(worst - size, size - top / (norm + off + eps)) + 8 * us * size
        if float(norm + off) == 0:
            e_size = torch.zeros(())
        most = top * (1 + (U.numel() + 8) * us)  # of an update's norm
        moved = ((size + e_size) * (U + eU)).clamp(max=most)
        self.eW = (
            abs(1 - lr * lam) * self.eW
            + 8 * us * (1 + lr * lam) * W.abs()
            + torch.minimum((size + e_size) * eU + e_size * U, size * U + most)
            + 4 * uw * (moved + W.abs() + self.eW)
            + (moved + W.abs() > 0) * least(units.weight)
        )

    def _hyperball(self, W: Tensor, P: Tensor, eP: Tensor, units: Rounding) -> None:
        us, uw = unit(units.statistics), unit(units.weight)
        lr, eps = float(self.lr), self.hyper["eps"]
        if self.t == 1:
            self.dW = self.eW.norm()
            self.v = W.norm()
            self.ev = self.dW + (W.numel() + 8) * us * (self.v + self.dW)
        assert self.v is not None
        assert self.ev is not None
        R, eR = self.v, self.ev
        dP = self.polar.off + uw * P.norm()  # of the perturbation bound, which is one in norm
        Q, eQ, dQ = normalized(P, eP, dP, eps, us)
        V, terms = W - lr * R * Q, W.abs() + self.eW + lr * (R + eR) * (Q.abs() + eQ)
        eV = self.eW + lr * ((R + eR) * eQ + eR * Q.abs()) + 4 * us * terms
        dV = self.dW + lr * ((R + eR) * dQ + eR) + 4 * us * terms.norm()
        dV = torch.minimum(dV, eV.norm())
        Y, eY, dY = normalized(V, eV, dV, eps, us)
        scale = (R + eR) / (V.norm() - dV).clamp(min=eps)
        rounded = 4 * uw * scale * terms + (terms > 0) * least(units.weight)
        self.dW = (R + eR) * dY + eR + rounded.norm()
        eW = torch.minimum((R + eR) * eY + eR * Y.abs() + rounded, self.dW)
        self.eW = eW.nan_to_num(nan=inf, posinf=inf)  # where V may be near 0 again and again


@dataclass
class Expected:
    """What one parameter is compared with: numbers, and how far the package's may be off."""

    weight: tuple[Tensor, Tensor]
    state: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lr: float | None = None
    weight_decay: float | None = None


class OfMatrix:
    """A matrix parameter of the optimizer's: its true matrices, one for each block."""

    def __init__(
        self,
        W: Tensor,
        eW: Tensor,
        transposed: bool,
        blocks: int | tuple[int, ...],
        count: int | None,
        rule: str,
        hyper: dict[str, Any],
    ) -> None:
        self.shape, self.transposed, self.count = W.shape, transposed, count
        self.lr, self.weight_decay = (torch.tensor(hyper[k], dtype=torch.float64) for k in ("lr", "weight_decay"))
        true = self._true(W)
        rows = true.size(0) // (count or 1)
        self.sizes = (count or 1) * ([rows // blocks] * blocks if isinstance(blocks, int) else list(blocks))
        parts = zip(torch.split(true, self.sizes), torch.split(self._true(eW), self.sizes), strict=True)
        self.blocks = []
        for block, off in parts:
            self.blocks.append(Matrix(block, rule, hyper, self.lr, self.weight_decay))
            self.blocks[-1].eW = off
        self.skipped = 0

    def _true(self, stored: Tensor) -> Tensor:
        """The true matrices, those of a batch one below the other."""
        matrices = stored.flatten(1)[None] if self.count is None else stored
        return (matrices.mT if self.transposed else matrices).flatten(0, 1)

    def _stored(self, blocks: list[Tensor]) -> Tensor:
        true = torch.cat(blocks)
        matrices = true.view(self.count or 1, -1, true.size(1))
        return (matrices.mT if self.transposed else matrices).reshape(self.shape)

    def step(self, G: Tensor, eG: Tensor, units: Rounding) -> None:
        parts = (torch.split(self._true(X), self.sizes) for X in (G, eG))
        for block, g, e in zip(self.blocks, *parts, strict=True):
            block.step(g, e, units)

    def round(self, units: Rounding) -> None:
        """The parameter and its state were cast."""
        for block in self.blocks:
            block.eW = block.eW + unit(units.weight) * block.W.abs()
            block.eM = block.eM + unit(units.momentum) * block.M.abs()
            if block.v is not None and block.ev is not None:
                block.ev = block.ev + unit(units.statistics) * block.v
            block.dW = block.dW + unit(units.weight) * block.W.norm()

    def expected(self) -> Expected:
        first = self.blocks[0]
        state = {
            "momentum_buffer": (self._stored([b.M for b in self.blocks]), self._stored([b.eM for b in self.blocks])),
            "step": (torch.tensor(float(first.t)), torch.zeros(())),
            "skipped": (torch.tensor(float(self.skipped)), torch.zeros(())),
        }
        if first.rule == "AdaMuon":
            state["v"] = self._stored([b.v for b in self.blocks]), self._stored([b.ev for b in self.blocks])  # type: ignore[misc]
        elif first.v is not None:
            # The rows of unequal blocks follow one another.
            together = torch.cat if first.rule == "NorMuon" and len(set(self.sizes)) > 1 else torch.stack
            whole = tuple(together([getattr(b, key) for b in self.blocks]) for key in ("v", "ev"))
            key = "radius" if first.rule == "MuonH" else "v"
            state[key] = whole if len(self.blocks) > 1 else (whole[0][0], whole[1][0])  # type: ignore[assignment]
        weight = self._stored([b.W for b in self.blocks]), self._stored([b.eW for b in self.blocks])
        return Expected(weight, state, float(self.lr), float(self.weight_decay))


class OfAdamW:
    """A parameter that torch.optim.AdamW trains, in float64."""

    def __init__(self, W: Tensor, eW: Tensor, hyper: dict[str, Any]) -> None:
        lr = hyper["lr"] if hyper["adamw_lr"] is None else hyper["adamw_lr"]
        self.W, self.eW = torch.nn.Parameter(W.clone()), eW
        self.optimizer = torch.optim.AdamW(
            [self.W],
            lr=lr,
            betas=hyper["adamw_betas"],
            eps=hyper["adamw_eps"],
            weight_decay=hyper["adamw_weight_decay"],
        )
        self.em, self.ev = torch.zeros_like(W), torch.zeros_like(W)

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    @functools.cached_property
    def nothing(self) -> Tensor:
        return torch.zeros_like(self.W)

    def state(self, key: str) -> Tensor:
        return self.optimizer.state[self.W].get(key, self.nothing)

    def step(self, G: Tensor, eG: Tensor, units: Rounding) -> None:
        u, tiny, (beta1, beta2) = unit(units.weight), least(units.weight), self.group["betas"]
        um = unit(units.momentum)
        before, size = self.W.detach().clone(), self.state("exp_avg").abs() + G.abs()
        self.W.grad = G
        self.optimizer.step()
        m, v, t = self.state("exp_avg"), self.state("exp_avg_sq"), float(self.state("step"))
        self.em = beta1 * self.em + (1 - beta1) * eG + 4 * um * size + (size > 0) * tiny
        self.ev = beta2 * self.ev + (1 - beta2) * square_interval(G, eG) + 3 * um * (v + self.ev) + (size > 0) * tiny
        scale, lr, decay = 1 - beta2**t, self.group["lr"], self.group["weight_decay"]
        kept = abs(1 - lr * decay) * self.eW
        low, high = quotient(m, self.em, v / scale, self.ev / scale, self.group["eps"], u)
        step = lr / (1 - beta1**t)
        moved = step * m.abs() / ((v / scale).sqrt() + self.group["eps"])
        off = torch.where(
            m.abs() > self.em, torch.maximum(step * high - moved, moved - step * low), step * high + moved
        )
        off = torch.where(high == 0, 0.0, off)
        self.eW = kept + off + 8 * u * (before.abs() + kept + moved + off) + (moved + off > 0) * tiny

    def round(self, units: Rounding) -> None:
        """The parameter and its state were cast."""
        u = unit(units.weight)
        self.eW = self.eW + u * self.W.detach().abs()
        self.em = self.em + u * self.state("exp_avg").abs()
        self.ev = self.ev + u * self.state("exp_avg_sq")

    def expected(self) -> Expected:
        state = {
            "exp_avg": (self.state("exp_avg"), self.em),
            "exp_avg_sq": (self.state("exp_avg_sq"), self.ev),
            "step": (torch.as_tensor(self.optimizer.state[self.W].get("step", 0.0)), torch.zeros(())),
        }
        return Expected((self.W.detach(), self.eW), state, self.group["lr"], self.group["weight_decay"])
