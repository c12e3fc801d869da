"""Communication and computation in a step of NAMO, from a trace of torch.profiler.

    python examples/benchmarks/overlap.py --figure overlap.png --trace traces   # the latter for ui.perfetto.dev

Two layouts: shards of FSDP2, and replicas as under DDP, which share out the orthogonalization. All bars are events of
the profiler. Computation: operators of the thread that steps, without waits and what Python does between operators.
Communication: gloo's collectives on gloo's own threads, pale until the last rank has taken up the collective, as
nothing travels before (for that the ranks' clocks are compared: all on one machine). Printed is the part of the time of
the all-to-alls, without the pale, that lies under an operator of the same rank, on average over the ranks; the step
with the median is drawn. With an accelerator kernels take the place of both; that has not been run.
"""

from __future__ import annotations

import argparse
import os
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step import CPU, make_module
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import profile, record_function

from lightning_namo import NAMO, build_optimizer

ROWS = {
    "_send_results": "results back",
    "_send_shards": "momentum to owners",
    "sum": "statistics",
    "work": "computation",
}
METHODS = ("_send_shards", "_receive_shards", "_send_results", "_receive_results")  # of the exchange, for a bucket
Bar = namedtuple("Bar", "row bucket taken_up begin end")  # times in ms; under way from begin on


def mark(optimizer: NAMO) -> int:
    """Have a range "bucket NUMBER METHOD" in the trace wherever the exchange turns to a bucket; their number."""
    _, _, exchange = optimizer._prepare()

    def marked(function: Callable[..., Any], number: int, *args: Any) -> Any:
        with record_function(f"bucket {number} {function.__name__}"):
            return function(number, *args)

    for name in METHODS:
        setattr(exchange, name, partial(marked, getattr(exchange, name)))
    return len(exchange.buckets)


def gather(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def lane(event: Any) -> tuple[Any, int]:
    """The thread, or the device and its stream."""
    return event.device_type(), event.device_resource_id()


def read(profiler: profile, device: torch.device) -> list[Bar]:
    """The bars of this rank, in time from the beginning of its step; collective."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.end_ns()))
    step = next(e for e in events if e.name() == "Optimizer.step#NAMO.step")
    ranges = [e for e in events if e.name().startswith("bucket")]

    def bar(event: Any, begin: int, launch: Any, row: str = "") -> Bar:
        """Its bucket, and row, are those that the exchange had last turned to at the launch."""
        alike = [r for r in ranges if lane(r) == lane(launch) and r.start_ns() <= launch.start_ns()]
        name = ([["", None, "sum"]] + [r.name().split() for r in alike])[-1]
        times = ((t - step.start_ns()) / 1e6 for t in (event.start_ns(), begin, event.end_ns()))
        return Bar(row or name[2], name[1], *times)

    launches = [e for e in events if e.name() in ("c10d::allreduce_", "c10d::alltoall_base_")]
    sent = [e for e in events if e.name().startswith(("gloo:", "ncclDevKernel"))]  # taken up in the order of launch
    begins = [max(starts) for starts in zip(*gather([e.start_ns() for e in sent]), strict=True)]
    bars = [bar(e, min(t, e.end_ns()), launch) for e, t, launch in zip(sent, begins, launches, strict=True)]
    last = 0
    for e in events:
        computes = not e.is_user_annotation() and (
            lane(e) == lane(step) if device == CPU else e.device_type() != step.device_type()
        )
        if computes and e.end_ns() > last and not e.name().startswith(("c10d", "nccl")):  # nor a part of the last one
            bars.append(bar(e, e.start_ns(), e, "work"))
            last = e.end_ns()
    return bars


def hidden(bars: list[Bar]) -> float:
    """The fraction of the all-to-alls' time that is overlapped by computation."""
    sent, done = [bar for bar in bars if bar.row in METHODS], [bar for bar in bars if bar.row == "work"]
    under = sum(max(0.0, min(a.end, b.end) - max(a.begin, b.begin)) for a in sent for b in done)
    return under / sum(bar.end - bar.begin for bar in sent)


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // args.ranks, 1))
    device = torch.accelerator.current_accelerator(check_available=True) or CPU
    if device != CPU:
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=args.ranks)
    mesh, panels = init_device_mesh(device.type, (args.ranks,)), {}
    for layout in ("FSDP2", "DDP"):
        optimizer = build_optimizer(make_module(args, device, mesh if layout == "FSDP2" else None), NAMO)
        if args.bucket_mib:
            optimizer.bucket_bytes = int(args.bucket_mib * 2**20)
        buckets, steps = mark(optimizer), []
        for _ in range(args.steps + 1):
            dist.barrier()
            with profile() as profiler:
                optimizer.step()
            bars = read(profiler, device)
            steps.append((fmean(gather(hidden(bars))), bars, profiler))
        steps = sorted(steps[1:], key=lambda step: step[0])  # without the first, which gets memory
        part, bars, profiler = steps[len(steps) // 2]
        ends = f"{steps[0][0]:.2f} to {steps[-1][0]:.2f} in {len(steps)} steps"
        title = f"{layout}: {part:.2f} of the all-to-alls' time is under computation ({ends})"
        panels[title] = bars
        if rank == 0:
            times = [bar.end - bar.begin for bar in bars if bar.row in METHODS]
            print(f"{title}; {buckets} buckets, {len(times)} all-to-alls, on rank 0 {sum(times):.1f} ms")
        if args.trace:
            args.trace.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(args.trace / f"{layout.lower()}-rank{rank}.json.gz"))
    args.where += f", {dist.get_default_backend_for_device(device)}, torch {torch.__version__[:4]}"
    if rank == 0 and args.figure:
        draw(panels, args)
    dist.destroy_process_group()


def draw(panels: dict[str, list[Bar]], args: argparse.Namespace) -> None:
    """Timelines of rank 0, a color for each bucket."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, bars) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        axes.set_yticks(range(len(ROWS)), ROWS.values())
        for row, bucket, taken_up, begin, end in bars:
            color = f"C{int(bucket) % 7}" if bucket else "tab:gray"
            y, height = list(ROWS).index(row), 0.7
            if row in METHODS:  # two lanes, as two may be under way
                y, height = y + (0.18 if int(bucket) % 2 else -0.18), 0.35
            axes.barh(y, begin - taken_up, height, taken_up, color=color, alpha=0.25)
            axes.barh(y, end - begin, height, begin, color=color, edgecolor=color, linewidth=0.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    for bucket in sorted({bar.bucket for bars in panels.values() for bar in bars if bar.bucket}, key=int):
        axes.barh(0, 0, color=f"C{int(bucket) % 7}", label=f"bucket {bucket}")
    axes.set_xlabel("ms since the step began; pale: waits until another rank takes up the collective too")
    figure.legend(loc="outside lower center", ncols=9, frameon=False)
    bound = f"{args.bucket_mib:g} MiB" if args.bucket_mib else "by default"
    what = f"the matrices of {args.blocks} GPT-2 blocks of width {args.width}, bucket_bytes {bound}"
    figure.suptitle(f"One step of NAMO on rank 0 of {args.ranks}: {what}\n{args.where}, torch.profiler", fontsize=11)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, two or more")
    parser.add_argument("--blocks", type=int, default=3, help="GPT-2 blocks")
    parser.add_argument("--width", type=int, default=768, help="channels")
    parser.add_argument("--bucket-mib", type=float, help="bucket_bytes; by default the optimizer's")
    parser.add_argument("--steps", type=int, default=7, help="steps to record; the one with the median is drawn")
    parser.add_argument("--where", default=f"{os.cpu_count()} CPUs", help="the machine, for the figure's title")
    parser.add_argument("--figure", type=Path, help="picture to write (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--trace", type=Path, help="folder for the traces of all ranks")
    args = parser.parse_args(namespace=argparse.Namespace(model="block"))
    if args.ranks < 2:
        parser.error(f"Expected --ranks of two or more: one process sends nothing. Got {args.ranks}.")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start = "spawn" if torch.accelerator.is_available() else "fork"  # which need not import everything again
    mp.start_processes(worker, (args, store.port), nprocs=args.ranks, start_method=start)


if __name__ == "__main__":
    main()
