"""The papers' update rules, box by box and in the papers' notation: what the package is tested against.

Slow and literal on purpose, and importing nothing of the package. One weight matrix W (m, n), gradients G_t
at steps t = 1, 2, ..., momentum M, polar factor O_t, learning rate eta, decay lam, decay rates mu1 and mu2 of
the two averages. Each optimizer is a generator that yields W after every step. Where paper and official code
differ, an argument chooses; the defaults are the official code, `PAPER` is the box of the NAMO paper.

Sources: NAMO and NAMO-D, arXiv 2602.17080; AdaMuon, arXiv 2507.11005; NorMuon, arXiv 2510.05491; Muon Hyperball,
arXiv 2606.16899; Muon, kellerjordan.github.io/posts/muon; the factor 0.2 sqrt(max(m, n)), arXiv 2502.16982; Polar
Express, arXiv 2505.16932.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf, sqrt

import torch
from torch import Tensor

torch.set_num_threads(1)  # the matrices of these tests are small: threads would only wait for one another

Orthogonalizer = Callable[[Tensor], Tensor]
Triple = tuple[float, float, float]

PAPER = {"nesterov": False, "shape_scale": None, "max_step": None, "decay": "adaptive"}

QUINTIC: list[Triple] = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS: list[Triple] = [  # algorithm 1 there, but for its further 1.01 on the norm
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
]


# --- orthogonalization ----------------------------------------------------------------------------


def polar(X: Tensor) -> Tensor:
    """U V^T without the null space: the polar factor, a partial isometry where X lacks full rank."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rank = int((S[0] * max(X.shape) * torch.finfo(X.dtype).eps < S).sum())
    return U[:, :rank] @ Vh[:rank]


def newton_schulz(N: Tensor, polynomials: Sequence[Triple] = QUINTIC, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Every product and every sum rounds to dtype, as in the code that came with Muon."""
    X = N.to(dtype)
    if N.size(0) > N.size(1):
        X = X.T
    X = X / (X.norm() + 1e-7)
    for a, b, c in polynomials:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if N.size(0) > N.size(1) else X


# --- what the optimizers share --------------------------------------------------------------------


def momenta(gradients: Iterable[Tensor], mu1: float, nesterov: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield t, G_t and what is orthogonalized at step t."""
    M = 0.0
    for t, G in enumerate(gradients, start=1):
        M = mu1 * M + (1 - mu1) * G
        yield t, G, (mu1 * M + (1 - mu1) * G if nesterov else M)


def shape_factor(W: Tensor, shape_scale: float | None) -> float:
    return 1.0 if shape_scale is None else shape_scale * sqrt(max(W.shape))


def decay_and_update(
    W: Tensor, O_t: Tensor, a: Tensor, s: float, *, eta: float, lam: float, decay: str, max_step: float | None
) -> Tensor:
    """Take the step of size a, a number or one number for each column; the floor at 0 is NAMO-D's."""
    cap = inf if max_step is None else max_step
    factor = 1 - lam * (a.clamp(max=cap) if decay == "adaptive" else eta * torch.ones_like(a))
    return W * (factor.clamp(min=0) if a.ndim else factor) - (a * s).clamp(max=cap) * O_t


# --- the optimizers ------------------------------------------------------------------------------


def namo(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    lam: float = 0.1,
    mu1: float = 0.95,
    mu2: float = 0.99,
    eps: float = 1e-8,
    nesterov: bool = True,
    shape_scale: float | None = 0.2,
    max_step: float | None = 1.0,
    decay: str = "adaptive",
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """NAMO, algorithm 1: one step size for the matrix."""
    s, v = shape_factor(W, shape_scale), 0.0
    for t, G, N in momenta(gradients, mu1, nesterov):
        v = mu2 * v + (1 - mu2) * G.square().sum()
        alpha = sqrt(1 - mu2**t) / (1 - mu1**t) * N.norm() / (v.sqrt() + eps)
        W = decay_and_update(W, orth(N).to(W), eta * alpha, s, eta=eta, lam=lam, decay=decay, max_step=max_step)
        yield W


def namo_d(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    lam: float = 0.1,
    mu1: float = 0.95,
    mu2: float = 0.99,
    eps: float = 1e-8,
    c: float = 0.1,
    nesterov: bool = True,
    shape_scale: float | None = 0.2,
    max_step: float | None = 1.0,
    decay: str = "adaptive",
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """NAMO-D, algorithm 2: one step size for each column, clipped to [c, 1/c] of the mean unless c = 0."""
    s, v = shape_factor(W, shape_scale), torch.zeros(W.size(1), dtype=W.dtype)
    for t, G, N in momenta(gradients, mu1, nesterov):
        v = mu2 * v + (1 - mu2) * G.square().sum(dim=0)
        r = N.norm(dim=0) / (v.sqrt() + eps)
        if c > 0:
            r = r.clamp(c * r.mean(), r.mean() / c)
        d = sqrt(1 - mu2**t) / (1 - mu1**t) * r
        W = decay_and_update(W, orth(N).to(W), eta * d, s, eta=eta, lam=lam, decay=decay, max_step=max_step)
        yield W


def muon(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    lam: float = 0.1,
    mu1: float = 0.95,
    nesterov: bool = True,
    order: str = "pre",
    shape_scale: float | None = 0.2,
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """Muon with Moonlight's shape factor, and the other orders of "Denoise First, Orthogonalize Later"."""
    s = shape_factor(W, shape_scale)
    if order == "pre":
        directions = (orth(N).to(W) for _, _, N in momenta(gradients, mu1, nesterov))
    elif order == "none":
        directions = (orth(G).to(W) for G in gradients)
    else:
        directions = (N for _, _, N in momenta((orth(G).to(W) for G in gradients), mu1, nesterov))
    for O_t in directions:
        W = W * (1 - eta * lam) - eta * s * O_t
        yield W


def adamuon(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    lam: float = 0.1,
    mu1: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = True,
    shape_scale: float = 0.2,
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """AdaMuon: elementwise second moment of the orthogonalized sign, update of RMS shape_scale * eta."""
    V = torch.zeros_like(W)
    for _, _, N in momenta(gradients, mu1, nesterov):
        O_t = orth(N.sign()).to(W)
        V = beta * V + (1 - beta) * O_t.square()
        U = O_t / (V.sqrt() + eps)
        W = W * (1 - eta * lam) - eta * shape_scale * sqrt(W.numel()) / (U.norm() + eps) * U
        yield W


def normuon(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    lam: float = 0.1,
    mu1: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = True,
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """NorMuon: second moment of the rows of the polar factor, update of RMS 0.2 eta."""
    v = torch.zeros(W.size(0), 1, dtype=W.dtype)
    for _, _, N in momenta(gradients, mu1, nesterov):
        O_t = orth(N).to(W)
        v = beta * v + (1 - beta) * O_t.square().mean(dim=1, keepdim=True)
        U = O_t / (v.sqrt() + eps)
        W = W * (1 - eta * lam) - eta * 0.2 * sqrt(W.numel()) / (U.norm() + eps) * U
        yield W


def muon_hyperball(
    W: Tensor,
    gradients: Iterable[Tensor],
    *,
    eta: float,
    mu1: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = True,
    orth: Orthogonalizer = polar,
) -> Iterator[Tensor]:
    """Muon Hyperball: weights on a sphere, updates of a fixed share of its radius."""
    R = W.norm()
    for _, _, N in momenta(gradients, mu1, nesterov):
        O_t = orth(N).to(W)
        V = W - eta * R * O_t / O_t.norm().clamp(min=eps)
        W = R * V / V.norm().clamp(min=eps)
        yield W


# --- a torch optimizer in the place of the generators above ---------------------------------------


def drive(
    make: Callable[..., torch.optim.Optimizer], W: Tensor, gradients: Iterable[Tensor], **hyper: object
) -> Iterator[Tensor]:
    """Yield W after every step of the optimizer."""
    W = torch.nn.Parameter(W.clone())
    optimizer = make([W], **hyper)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        yield W.detach().clone()
