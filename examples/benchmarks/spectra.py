"""What one reading of a matrix costs, beside torch's full SVD and its randomized one, and how exact these are.

    OMP_NUM_THREADS=1 python examples/benchmarks/spectra.py

For each shape, on noise and on a signal of rank 8 in noise: milliseconds of the decomposition that `SpectralMonitor`
uses, ratios of the others' times to it, taken in turns in one run, and by how much the randomized SVD's 8 leading
singular vectors are off (the sine of the largest angle).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from lightning_namo.telemetry.spectra import Decomposition, subspace_error

RANK = 8


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, nargs="+", default=[128, 128, 128, 512, 768, 768, 768, 3072])
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| m x n | | Gram square, ms | SVD | randomized SVD | its subspace is off by |\n|---|---|---|---|---|---|")
    for shape in zip(args.shapes[::2], args.shapes[1::2], strict=True):
        for kind in ("noise", "signal in noise"):
            torch.manual_seed(0)
            X = torch.randn(shape, device=device)
            if kind != "noise":
                X += (
                    3
                    * max(shape) ** 0.5
                    * torch.linalg.qr(torch.randn(shape[0], RANK, device=device)).Q
                    @ (torch.linalg.qr(torch.randn(shape[1], RANK, device=device)).Q.mT)
                )
            ways: dict[str, Callable[[], object]] = {
                "gram": lambda X=X: Decomposition(X),
                "svd": lambda X=X: torch.linalg.svd(X, full_matrices=False),
                "randomized": lambda X=X: torch.svd_lowrank(X, q=2 * RANK, niter=4),
            }
            rounds = [{name: timed(way, device) for name, way in ways.items()} for _ in range(args.rounds + 1)]
            middle = {name: statistics.median(times[name] for times in rounds[1:]) for name in ways}
            exact = torch.linalg.svd(X.double(), full_matrices=False)[0][:, :RANK]
            off = float(subspace_error(torch.svd_lowrank(X, q=2 * RANK, niter=4)[0][:, :RANK].double(), exact))
            own = middle["gram"]
            ratios = " | ".join(f"{middle[name] / own:.2f}" for name in ("svd", "randomized"))
            print(f"| {shape[0]} x {shape[1]} | {kind} | {own:.2f} | {ratios} | {off:.2g} |")


if __name__ == "__main__":
    main()
