"""Calibrates the choice between steps on the matrix and steps by way of its Gram square: what each takes, by shape.

    python examples/benchmarks/polar.py --short 256 768 1280 --threads 1

The package chooses by FLOPs (`lightning_namo.orthogonalize.newton_schulz_flops`), which are the same on all ranks. The
ways take turns in each round; times are the least of the rounds, per matrix. "chosen" is marked with a star. Last comes
what the Gram square takes as `symmetric_product` computes it (on CPUs by blocks from 768 on), over one plain product.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from lightning_namo.polar.coefficients import newton_schulz_polynomials
from lightning_namo.polar.cost import flops, segment_lengths
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.polar.newton_schulz import _iterate
from lightning_namo.polar.symmetric import symmetric_product
from lightning_namo.workspace import Workspace

WAYS = {"on the matrix": (1, 1, 1, 1, 1), "2 + 1 + 2": (2, 1, 2), "3 + 2": (3, 2)}


def fastest(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds that each took in the fastest of the rounds, after one that does not count."""
    least = dict.fromkeys(ways, math.inf)
    for number in range(rounds + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if number:
                least[way] = min(least[way], time.perf_counter() - begin)
    return least


def seconds(batch: torch.Tensor, rounds: int) -> dict[str, float]:
    """Of the five quintic steps, by way, per matrix."""
    polynomials, workspace = newton_schulz_polynomials("quintic", 5), Workspace()

    def iterate(lengths: tuple[int, ...]) -> None:
        with workspace.frame():
            _iterate([batch], polynomials, lengths, batch.dtype, workspace)

    least = fastest({way: partial(iterate, lengths) for way, lengths in WAYS.items()}, rounds)
    return {way: taken / len(batch) for way, taken in least.items()}


def symmetric_over_plain(batch: torch.Tensor, rounds: int) -> float:
    """What the Gram square takes over one plain product."""
    square = batch.new_empty(len(batch), batch.shape[-1], batch.shape[-1])
    ways = {"symmetric": partial(symmetric_product, batch.mT, batch, out=square)}
    ways["plain"] = partial(torch.bmm, batch.mT, batch, out=square)
    least = fastest(ways, rounds)
    return least["symmetric"] / least["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, nargs="+", default=[256, 768, 1280], help="short sides")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1, 1.25, 1.5, 2, 3, 4], help="long side : short side"
    )
    parser.add_argument("--batch", type=int, default=1, help="matrices in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = iteration_dtype(device.type)
    print(f"{device.type}, {args.threads} thread(s), {dtype}, batches of {args.batch}; ms and TFLOP/s of one matrix")
    polynomials = newton_schulz_polynomials("quintic", 5)
    for short in args.short:
        for ratio in args.ratios:
            long = round(short * ratio)
            chosen = segment_lengths(polynomials, short, long)
            batch = torch.randn(args.batch, long, short, device=device, dtype=dtype)
            cells = []
            for way, least in seconds(batch, args.rounds).items():
                rate = flops(short, long, WAYS[way]) / least / 1e12
                cells.append(f"{way} {1e3 * least:7.2f} ({rate:.2f}){'*' if WAYS[way] == chosen else ' '}")
            cells.append(f"Gram square {symmetric_over_plain(batch, args.rounds):.2f}")
            print(f"{long:5} x {short:<5}", "  ".join(cells))


if __name__ == "__main__":
    main()
