"""The tables of docs/scale.md: what `lightning-namo plan` computes, by model, strategy and number of ranks.

    python examples/benchmarks/scale_notes.py                         # prints them, and how long each model took
    python examples/benchmarks/scale_notes.py --out docs/scale.md     # puts them into the page

Needs no accelerator and no processes: models are on the meta device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_namo import NAMO, build_optimizer
from lightning_namo.planning.cost_model import Estimate, Rates, estimate
from lightning_namo.planning.models import MODELS, build_model
from lightning_namo.planning.simulated_mesh import SimulatedMesh

LAYOUTS = ("fsdp2", "hsdp", "ddp")
BEGIN, END = "<!-- tables: examples/benchmarks/scale_notes.py -->", "<!-- end of tables -->"
MOST = {"deepseek_v3": 64}  # ranks: beyond, a unit for each expert on each rank takes minutes
LIMIT = 300.0  # seconds for one model, many times what it takes: something is quadratic again


def compute(model: str, ranks: Sequence[int]) -> dict[int, dict[str, Estimate]]:
    """Estimates by number of ranks and layout."""
    built = build_model(model)
    optimizer = build_optimizer(built.module, NAMO)
    return {
        count: {
            layout: estimate(optimizer, SimulatedMesh.of(layout, count), Rates(), built.tokens) for layout in LAYOUTS
        }
        for count in ranks
    }


def short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def memory_rows(model: str, estimates: dict[int, dict[str, Estimate]]) -> Iterator[tuple[str, ...]]:
    for count, by_layout in estimates.items():
        ranks = [by_layout[layout].ranks for layout in LAYOUTS]
        namo = [max(r.parameters + r.gradients + r.state for r in of) / 1e9 for of in ranks]
        adamw = [max(r.parameters + r.gradients + r.adamw_state for r in of) / 1e9 for of in ranks]
        buffers = [max(r.buffers for r in of) / 1e9 for of in ranks]
        yield model, f"{count}", *(" / ".join(map(short, sizes)) for sizes in (namo, adamw, buffers))


def time_rows(model: str, estimates: dict[int, dict[str, Estimate]]) -> Iterator[tuple[str, ...]]:
    for count, by_layout in estimates.items():
        results = [by_layout[layout] for layout in LAYOUTS]
        mean = [sum(r.sent for r in result.ranks) / count / 1e6 for result in results]
        most = [max(r.sent for r in result.ranks) / 1e6 for result in results]
        steps = [1e3 * result.overlapped_seconds for result in results]
        shares = [100 * (result.overhead or 0) for result in results]
        first = results[0]
        yield (
            model,
            f"{count}",
            f"{sum(rank.matrices > 0 for rank in first.ranks)}",
            f"{first.busiest / (first.flops / count):.2f}",
            f"{first.busiest / first.bound:.3f}",
            *(" / ".join(map(short, sizes)) for sizes in (mean, most, steps, shares)),
        )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 512, 1024])
    parser.add_argument("--out", type=Path, help="page to put the tables into")
    args = parser.parse_args()
    memory, times = [], []
    for model in args.models:
        begin, counts = time.perf_counter(), [count for count in args.ranks if count <= MOST.get(model, count)]
        estimates = compute(model, counts)
        seconds = time.perf_counter() - begin
        print(f"{model}: {len(counts) * len(LAYOUTS)} plans in {seconds:.1f} s", file=sys.stderr)
        assert seconds < LIMIT
        memory += memory_rows(model, estimates)
        times += time_rows(model, estimates)
    order = " / ".join(LAYOUTS)
    lines = [
        f"Memory of the fullest rank, GB, {order}:",
        "",
        *markdown(("model", "ranks", "with NAMO", "with AdamW", "NAMO's buffers in a step"), memory),
        "",
        f"A step; the last four columns {order}:",
        "",
        *markdown(
            (
                "model",
                "ranks",
                "owners",
                "busiest : mean",
                "busiest : bound",
                "MB sent, mean",
                "MB sent, most",
                "step, ms",
                "share of training, %",
            ),
            times,
        ),
    ]
    print("\n".join(lines))
    if args.out:
        before, _, rest = args.out.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        args.out.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
