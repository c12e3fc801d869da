"""The sharded step against torch.optim.Muon on the same DTensors, and against redundant full_tensor() Muon.

    python examples/benchmarks/sharded_step.py --ranks 2 --blocks 3

Starts R processes, one thread each on a CPU. All sides take turns in every round of one run, on the same gradients,
and the medians over the rounds (of the slowest rank in each) are compared. "redundant" gathers every momentum on
every rank and orthogonalizes all of it there, with this package's iteration.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_namo import NAMO, NAMOD, Muon, orthogonalize
from lightning_namo.base import OrthogonalizedOptimizer

MOMENTUM, LR, WEIGHT_DECAY = 0.95, 1e-3, 0.1


def block_shapes(width: int) -> list[tuple[int, int]]:
    """The four matrices of a GPT-2 block."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


class Redundant(torch.optim.Optimizer):
    """Muon that gathers every matrix on every rank: what is simple, and repeats the work R times."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})
        for parameter in params:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Gather, orthogonalize everything, keep the own part."""
        params = self.param_groups[0]["params"]
        full = []
        for parameter in params:
            momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            full.append(torch.lerp(parameter.grad, momentum, MOMENTUM).to(torch.bfloat16).full_tensor())
        for parameter, polar in zip(params, orthogonalize(full), strict=True):
            local = distribute_tensor(polar, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
            scale = 0.2 * max(parameter.shape) ** 0.5
            parameter.to_local().mul_(1 - LR * WEIGHT_DECAY).add_(local, alpha=-LR * scale)


def make_sides(mesh: DeviceMesh, shapes: list[tuple[int, int]]) -> dict[str, torch.optim.Optimizer]:
    """One optimizer for each side, each on its own copy of the same parameters and gradients."""

    def parameters() -> list[Tensor]:
        torch.manual_seed(0)
        params = []
        for shape in shapes:
            parameter = torch.nn.Parameter(distribute_tensor(torch.randn(shape) * 0.02, mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
            params.append(parameter)
        return params

    return {
        "NAMO": NAMO(parameters(), lr=LR),
        "NAMO-D": NAMOD(parameters(), lr=LR),
        "Muon": Muon(parameters(), lr=LR, weight_decay=WEIGHT_DECAY),
        "torch.optim.Muon": torch.optim.Muon(
            parameters(), lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        "redundant": Redundant(parameters()),
    }


def seconds(step: Callable[[], object]) -> float:
    """Time of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elapsed = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(args.threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(args.ranks))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank)
    dist.init_process_group()
    mesh = init_device_mesh(device.type, (args.ranks,))
    shapes = block_shapes(args.width) * args.blocks
    sides = make_sides(mesh, shapes)
    for optimizer in sides.values():
        optimizer.step()  # plans, buffers, allocations
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, optimizer in sides.items():
            times[name].append(seconds(optimizer.step))
    calls = {}
    for name, optimizer in sides.items():
        if not isinstance(optimizer, OrthogonalizedOptimizer):
            with CommDebugMode() as mode:
                optimizer.step()
            calls[name] = mode.get_total_counts()
    if rank == 0:
        report(args, shapes, sides, times, calls)
    dist.destroy_process_group()


def report(
    args: argparse.Namespace,
    shapes: list[tuple[int, int]],
    sides: dict[str, torch.optim.Optimizer],
    times: dict[str, list[float]],
    calls: dict[str, int],
) -> None:
    elements = sum(m * n for m, n in shapes)
    print(f"{args.ranks} ranks, {args.threads} threads each; {len(shapes)} matrices, {elements / 1e6:.1f}M elements")
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, median in medians.items():
        optimizer = sides[name]
        sent = collectives = ""
        if isinstance(optimizer, OrthogonalizedOptimizer):
            exchange = optimizer._plan()[2]
            sent, collectives = f"{exchange.bytes_sent / 1e6:.1f}", str(2 * len(exchange.plan.buckets) + 1)
        rows.append(
            {
                "side": name,
                "median ms": f"{1e3 * median:.0f}",
                "of torch.optim.Muon": f"{median / medians['torch.optim.Muon']:.2f}",
                "of redundant": f"{median / medians['redundant']:.2f}",
                "MB sent, rank 0": sent,
                "collectives": collectives or str(calls[name]),
            }
        )
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(value.rjust(widths[key]) for key, value in row.items()))
    namo = sides["NAMO"]
    assert isinstance(namo, NAMO)
    exchange = namo._plan()[2]
    loads: Counter[int] = Counter()
    for matrix, owner in zip(exchange.matrices, exchange.plan.owners, strict=True):
        loads[owner] += matrix.cost
    total = sum(loads.values())
    print("owners' shares of the work:", ", ".join(f"rank {r} {loads[r] / total:.1%}" for r in range(args.ranks)))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=3, help="GPT-2 blocks, four matrices each")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--csv", help="file to write the table to")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (args, port), nprocs=args.ranks)


if __name__ == "__main__":
    sys.exit(main())
