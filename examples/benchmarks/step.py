"""One optimizer step on GPT-2's parameters, ours beside others': time, FLOPs, operations, bytes and memory.

    python examples/benchmarks/step.py --csv step.csv --figure step.png  # three blocks of width 768: twelve matrices
    python examples/benchmarks/step.py --model small                     # all of GPT-2 small, embeddings too
    python examples/benchmarks/step.py --ranks 2 --threads 1             # the shards of FSDP2 on two processes
    python examples/benchmarks/step.py --authors ../namo --dion ../dion  # checkouts of minxin-zhg/namo, microsoft/dion

All sides take turns in each round of one run, the order moving on by one, each on its own copy of parameters and
gradients; a time is that of the slowest rank. Sides that know matrices only are joined by torch's fused AdamW for the
rest. "redundant" gathers every momentum on every rank and orthogonalizes all of it there, with this package's
iteration. What the counts mean stands in tally.py; they are taken after the rounds, in steps of their own.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sides import OURS, Side, find_sides
from tally import MEASURES, measure, tensor_bytes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_namo import split_parameters
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.planning.report import table

SHAPES = {"block": (3, 768), "small": (12, 768), "medium": (24, 1024), "large": (36, 1280)}  # blocks, width
BASE = "torch.optim.Muon"  # of the figure's ratios
CPU = torch.device("cpu")


def on_meta(model: str, blocks: int, width: int) -> nn.Module:
    """The matrices of GPT-2's blocks, or a whole GPT-2, without memory."""
    with torch.device("meta"):
        if model != "block":
            return GPT2(GPT2Config(n_layer=blocks, n_head=max(width // 64, 1), n_embd=width))
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks
        return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))


def make_module(args: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None) -> nn.Module:
    """Random parameters and gradients, in shards if there is a mesh, the same at every call."""
    module = on_meta(args.model, args.blocks, args.width)
    if mesh is not None:
        fully_shard(module, mesh=mesh)
    module.to_empty(device=device)
    if isinstance(module, GPT2):
        module.lm_head.weight = module.transformer["wte"].weight  # to_empty parts them
    torch.manual_seed(0 if mesh is None else dist.get_rank())
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)
        for tensor, std in ((parameter.detach(), 0.02), (parameter.grad, 1.0)):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).normal_(std=std)
    return module


def step_all(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def seconds(step: Callable[[], object]) -> float:
    """Time of the slowest rank."""
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    step()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elapsed = torch.tensor(
        [time.perf_counter() - begin], device=torch.accelerator.current_accelerator(check_available=True)
    )
    if dist.is_initialized():
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def fit_together(args: argparse.Namespace, sides: int) -> bool:
    """Whether all sides' parameters, gradients, momentum and AdamW's second moment fit into what memory is left."""
    groups = split_parameters(on_meta(args.model, args.blocks, args.width))
    copies = [(3 if group["orthogonalize"] else 4, [p for _, p in group["params"]]) for group in groups]
    needed = sides * sum(number * tensor_bytes(parameters) for number, parameters in copies)
    if torch.accelerator.is_available():
        return needed / args.ranks < 0.8 * int(torch.accelerator.get_memory_info()[0])
    return needed < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def run(
    args: argparse.Namespace, sides: Sequence[Side], device: torch.device, mesh: DeviceMesh | None
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], str]:
    """Times and measures by label, and how NAMO shares the work, of sides that are in memory together."""
    steps, scratch, sharing = {}, {}, ""
    for side in sides:
        module = make_module(args, device, mesh if side.sharded else None)
        optimizers = side.make(module, mesh)
        steps[side.label] = functools.partial(step_all, optimizers)
        steps[side.label]()  # plans, buffers, compilation
        steps[side.label]()
        scratch[side.label] = sum(
            o._prepare()[2].workspace.nbytes for o in optimizers if isinstance(o, OrthogonalizedOptimizer)
        )  # taken at the first step and kept
        if side.label == "NAMO" and isinstance(optimizers[0], OrthogonalizedOptimizer) and mesh is not None:
            sharing = optimizers[0].sharing()
    times: dict[str, list[float]] = {label: [] for label in steps}
    labels = list(steps)
    for number in range(args.rounds):
        for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
            times[label].append(seconds(steps[label]))
    measures = {label: measure(step) for label, step in steps.items()}
    for label, of_side in measures.items():
        of_side["peak MB"] += scratch[label] / 1e6
    return times, measures, sharing


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(args.threads)
    device, mesh = torch.accelerator.current_accelerator(check_available=True) or CPU, None
    if args.ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(args.ranks))
        if device != CPU:
            torch.accelerator.set_device_index(rank)
        dist.init_process_group()
        mesh = init_device_mesh(device.type, (args.ranks,))
    found, notes = find_sides(args.ranks, args.authors, args.dion, args.their_adamw)
    names = args.sides.split(",") if args.sides else list(found)
    if unknown := [name for name in names if name not in found]:
        raise SystemExit(f"Expected --sides among {', '.join(found)}. Got {', '.join(unknown)}. {' '.join(notes)}")
    sides = [found[name] for name in names]
    together = not args.alone and fit_together(args, len(sides))
    if not together:
        notes.append("One side after another, not in turns: ratios within rounds compare different minutes.")
    times: dict[str, list[float]] = {}
    measures: dict[str, dict[str, float]] = {}
    sharing = ""
    for group in [sides] if together else [[side] for side in sides]:
        results = run(args, group, device, mesh)
        times |= results[0]
        measures |= results[1]
        sharing = sharing or results[2]
    if rank == 0:
        report(args, device, times, measures, [*notes, *sharing.splitlines()])
    if mesh is not None:
        dist.destroy_process_group()


def compare(times: dict[str, list[float]], label: str, other: str) -> tuple[float, float, float, float]:
    """The ratio of two sides' medians; the median, least and most of the ratios within the rounds."""
    within = [mine / theirs for mine, theirs in zip(times[label], times[other], strict=True)]
    ratio = statistics.median(times[label]) / statistics.median(times[other])
    return ratio, statistics.median(within), min(within), max(within)


def report(
    args: argparse.Namespace,
    device: torch.device,
    times: dict[str, list[float]],
    measures: dict[str, dict[str, float]],
    notes: Sequence[str],
) -> None:
    parameters = list(on_meta(args.model, args.blocks, args.width).parameters())
    elements = sum(parameter.numel() for parameter in parameters) / 1e6
    title = (
        f"{args.model}, {args.blocks} blocks of width {args.width}: {len(parameters)} parameters, {elements:.1f}M "
        f"elements; {args.ranks} process(es), {args.threads} thread(s) each, {device.type}, torch {torch.__version__}"
    )
    rows = []
    references = [label for label in times if label not in OURS or label == "Muon"]
    for label, values in times.items():
        row = {"side": label, "step, median ms": f"{1e3 * statistics.median(values):.4g}"}
        row |= {"fastest ms": f"{1e3 * min(values):.4g}", "slowest ms": f"{1e3 * max(values):.4g}"}
        row |= {name: f"{measures[label][name]:.5g}" for name in MEASURES}
        for other in references:
            name = "our Muon" if other == "Muon" else other
            keys = (f"of {name}", f"of {name}, median of rounds", f"of {name}, least", f"of {name}, most")
            row |= dict(zip(keys, (f"{ratio:.3f}" for ratio in compare(times, label, other)), strict=True))
        rows.append(row)
    shown = [key for key in rows[0] if not key.startswith("of ")]
    ours = [label for label in OURS if label in times]
    cells: list[Sequence[str]] = [("time of", *ours)]
    for other in references:
        ratios = ("{:.2f} ({:.2f}, {:.2f} to {:.2f})".format(*compare(times, label, other)) for label in ours)
        cells.append((f"of {'our Muon' if other == 'Muon' else other}", *ratios))
    lines = [title, "", *table([shown, *([row[key] for key in shown] for row in rows)]), ""]
    lines += ["Ratio of the medians (median and range of the ratios within the rounds):", "", *table(cells), "", *notes]
    print("\n".join(lines))
    if args.csv:
        write_csv(rows, args.csv)
    if args.figure:
        draw(title, times, args.figure)


def write_csv(rows: Sequence[dict[str, str]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw(title: str, times: dict[str, list[float]], out: Path) -> None:
    """The medians as bars, fastest and slowest as whiskers, and each side's ratio to torch.optim.Muon."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    labels = list(times)[::-1]
    medians = [1e3 * statistics.median(times[label]) for label in labels]
    ends = [[m - 1e3 * min(times[k]) for m, k in zip(medians, labels, strict=True)]]
    ends += [[1e3 * max(times[k]) - m for m, k in zip(medians, labels, strict=True)]]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(labels)), constrained_layout=True)
    colors = ["tab:blue" if label in OURS else "tab:gray" for label in labels]
    bars = axes.barh(labels, medians, xerr=ends, color=colors, error_kw={"linewidth": 1})
    if BASE in times:
        axes.bar_label(bars, [f"{compare(times, label, BASE)[0]:.2f}" for label in labels], padding=6)
    axes.margins(x=0.1)
    axes.set_xlabel(f"optimizer step, ms; at the bar its ratio to {BASE}" if BASE in times else "optimizer step, ms")
    axes.set_title(title.replace("; ", "\n"), fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="block", choices=SHAPES, help="block: only the matrices of GPT-2's blocks")
    parser.add_argument("--blocks", type=int, help="GPT-2 blocks; by default the model's")
    parser.add_argument("--width", type=int, help="channels; by default the model's")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", help="some only, as in namo,torch,adamw")
    parser.add_argument("--authors", type=Path, help="checkout of github.com/minxin-zhg/namo")
    parser.add_argument("--dion", type=Path, help="checkout of github.com/microsoft/dion")
    parser.add_argument("--their-adamw", action="store_true", help="others that have an AdamW train the rest with it")
    parser.add_argument("--alone", action="store_true", help="one side after another, to save memory")
    parser.add_argument("--csv", type=Path, help="table to write")
    parser.add_argument("--figure", type=Path, help="picture to write (.png, .svg, .pdf); needs matplotlib")
    args = parser.parse_args()
    blocks, width = SHAPES[args.model]
    args.blocks, args.width = args.blocks or blocks, args.width or width
    if args.ranks == 1:
        worker(0, args, 0)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "spawn" if torch.accelerator.is_available() else "fork"  # which need not import everything again
    mp.start_processes(worker, (args, port), nprocs=args.ranks, start_method=start)


if __name__ == "__main__":
    main()
