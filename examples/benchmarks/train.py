"""What the optimizer adds to a training step of GPT-2: Muon, NAMO and NAMO-D beside AdamW, at several batch sizes.

    python examples/benchmarks/train.py --csv train.csv --figure train.png    # GPT-2 small, 1 x 1024 tokens at a time
    python examples/benchmarks/train.py --micro-batch 16 --tokens 16384 131072 491520          # with an accelerator

A step is what the recipes in configs/ do on one device: passes over the micro-batches, clipping at norm 1, the
optimizer (AdamW is torch's fused one). The optimizers share one network, so their passes are the same work, and take
turns in each round. Batches of up to --measured micro-batches are run whole. For all batches, 491,520 tokens (the
paper's) among them, a step is also computed: micro-batches x median time of one + median of clipping + median of the
optimizer's step. Under data parallelism a rank has fewer micro-batches, and a smaller share of the optimizer's work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step import SHAPES, write_csv
from torch import Tensor
from torch.optim import Optimizer

from lightning_namo import NAMO, NAMOD, Muon, build_optimizer, clip_gradients
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import cross_entropy
from lightning_namo.planning.report import table

GOAL = 4.0  # % over AdamW at most, at
GOAL_TOKENS = 480 * 1024  # a step, arXiv 2602.17080
LR, WEIGHT_DECAY = 1e-4, 0.1  # small: what is learned does not matter here


@dataclass
class Times:
    """Seconds of the parts of one step."""

    passes: float
    clipping: float
    optimizer: float

    @property
    def whole(self) -> float:
        """Seconds of the step."""
        return self.passes + self.clipping + self.optimizer


def now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def train(net: GPT2, optimizer: Optimizer, batch: Tensor, micro_batches: int, precision: str) -> Times:
    """One step; batch holds token ids, (B, T + 1)."""
    begin = now()
    for _ in range(micro_batches):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            total, tokens = cross_entropy(net(batch[:, :-1]), batch[:, 1:])
        (total / tokens / micro_batches).backward()
    passed = now()
    clip_gradients(net, max_norm=1.0)
    clipped = now()
    optimizer.step()
    stepped = now()
    optimizer.zero_grad()
    return Times(passed - begin, clipped - passed, stepped - clipped)


def measure(args: argparse.Namespace, device: torch.device, counts: Sequence[int]) -> dict[str, dict[int, list[Times]]]:
    """Times of the rounds by optimizer and number of micro-batches."""
    torch.manual_seed(0)
    with device:
        config = GPT2Config(
            n_layer=args.blocks, n_head=max(args.width // 64, 1), n_embd=args.width, block_size=args.block_size
        )
        net = GPT2(config)
        batch = torch.randint(config.vocab_size, (args.micro_batch, args.block_size + 1))
    keys: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    optimizers: dict[str, Optimizer] = {
        "AdamW": build_optimizer(net, torch.optim.AdamW, betas=(0.9, 0.95), fused=True, **keys),
        "Muon": build_optimizer(net, Muon, **keys),
        "NAMO": build_optimizer(net, NAMO, **keys),
        "NAMO-D": build_optimizer(net, NAMOD, clamp=0.1, **keys),
    }
    for optimizer in optimizers.values():
        train(net, optimizer, batch, 1, args.precision)  # state, plans, buffers
    times: dict[str, dict[int, list[Times]]] = {name: {count: [] for count in counts} for name in optimizers}
    names = list(optimizers)
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for count in counts:
                times[name][count].append(train(net, optimizers[name], batch, count, args.precision))
    return times


def make_rows(
    args: argparse.Namespace, times: dict[str, dict[int, list[Times]]]
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """A row for each batch size and optimizer, and the medians of the parts in seconds."""
    runs = [(count, run) for by_count in times.values() for count, runs in by_count.items() for run in runs]
    parts = {
        "micro-batch": statistics.median(run.passes / count for count, run in runs),
        "clipping": statistics.median(run.clipping for _, run in runs),
    }
    for name, by_count in times.items():
        parts[name] = statistics.median(run.optimizer for runs in by_count.values() for run in runs)
    rows = []
    for tokens in sorted(args.tokens):
        count = tokens // (args.micro_batch * args.block_size)
        computed = {name: count * parts["micro-batch"] + parts["clipping"] + parts[name] for name in times}
        for name, by_count in times.items():
            row = {"tokens a step": f"{tokens}", "micro-batches": f"{count}", "optimizer": name}
            row |= {"step s, computed": f"{computed[name]:.4g}"}
            row |= {"optimizer % of it": f"{100 * parts[name] / computed[name]:.2f}"}
            row |= {"over AdamW %, computed": f"{100 * (computed[name] / computed['AdamW'] - 1):.2f}"}
            row |= {"step s, measured": "", "over AdamW %, measured": ""}
            if count in by_count:
                measured, adamw = (
                    statistics.median(run.whole for run in times[which][count]) for which in (name, "AdamW")
                )
                row |= {"step s, measured": f"{measured:.4g}"}
                row |= {"over AdamW %, measured": f"{100 * (measured / adamw - 1):.2f}"}
            rows.append(row)
    return rows, parts


def draw(title: str, rows: Sequence[dict[str, str]], out: Path) -> None:
    """Time over AdamW by batch size: lines as computed, points as measured, and the goal."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for name, color in (("Muon", "tab:gray"), ("NAMO", "tab:blue"), ("NAMO-D", "tab:orange")):
        mine = [row for row in rows if row["optimizer"] == name]
        for key, style in (("computed", "-"), ("measured", "o")):
            points = [(int(row["tokens a step"]), row[f"over AdamW %, {key}"]) for row in mine]
            x, y = ([tokens for tokens, share in points if share], [float(share) for _, share in points if share])
            axes.plot(x, y, style, color=color, linewidth=1.2, markersize=5, label=f"{name}, {key}")
    axes.axhline(GOAL, color="black", linewidth=1, linestyle="--")
    axes.plot([GOAL_TOKENS], [GOAL], "kv", label=f"goal: at most {GOAL:g}% at {GOAL_TOKENS:,}")
    axes.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="training step over AdamW's, %")
    axes.set_title(title.replace("; ", "\n"), fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=[name for name in SHAPES if name != "block"])
    parser.add_argument("--blocks", type=int, help="GPT-2 blocks; by default the model's")
    parser.add_argument("--width", type=int, help="channels; by default the model's")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a forward and backward pass")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a step; by default 1, 2, 8, 64 passes and 491,520")
    parser.add_argument("--measured", type=int, default=2, help="most micro-batches of a step that is run whole")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="table to write")
    parser.add_argument("--figure", type=Path, help="picture to write (.png, .svg, .pdf); needs matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks, width = SHAPES[args.model]
    args.blocks, args.width = args.blocks or blocks, args.width or width
    size = args.micro_batch * args.block_size
    args.tokens = args.tokens or [size, 2 * size, 8 * size, 64 * size, GOAL_TOKENS]
    if uneven := [tokens for tokens in args.tokens if tokens % size or not tokens]:
        raise SystemExit(f"Expected --tokens to be multiples of {args.micro_batch} x {args.block_size}. Got {uneven}.")
    counts = sorted({tokens // size for tokens in args.tokens if tokens <= args.measured * size}) or [1]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    times = measure(args, device, counts)
    rows, parts = make_rows(args, times)
    title = (
        f"GPT-2 {args.model}, {args.blocks} blocks of width {args.width}, {args.micro_batch} x {args.block_size} "
        f"tokens at a time, {args.precision}; {device.type}, {args.threads} thread(s), torch {torch.__version__}"
    )
    medians = ", ".join(f"{name} {1e3 * part:.4g} ms" for name, part in parts.items())
    print(
        title, "", f"Medians: {medians}", "", *table([list(rows[0]), *(list(row.values()) for row in rows)]), sep="\n"
    )
    for row in rows:
        if row["tokens a step"] == f"{GOAL_TOKENS}" and row["optimizer"] != "AdamW":
            over = row["over AdamW %, computed"]
            met = "met" if float(over) <= GOAL else "missed"
            print(f"{row['optimizer']} at {GOAL_TOKENS:,} tokens: {over}% over AdamW, computed; goal {GOAL:g}%: {met}")
    if args.csv:
        write_csv(rows, args.csv)
    if args.figure:
        draw(title, rows, args.figure)


if __name__ == "__main__":
    main()
