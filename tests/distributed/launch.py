"""Start real processes in a gloo group, wait no longer than a deadline, and bring their answers or errors back."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class WorkerError(RuntimeError):
    """What the ranks raised, or that they hung."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call ``worker(rank, *args)`` on every rank of a new group; its results by rank.

    Raises:
        WorkerError: With every rank's message, if one raised, or if one is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_main, args=(worker, rank, world_size, port, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = [f"rank {r}: {p.read_text()}" for r in range(world_size) if (p := Path(folder, f"{r}.error")).exists()]
        if hanging or errors or any(process.exitcode for process in processes):
            codes = [process.exitcode for process in processes]
            raise WorkerError(f"hanging ranks {hanging}, exit codes {codes}\n" + "\n".join(errors))
        return [torch.load(Path(folder, f"{r}.pt"), weights_only=False) for r in range(world_size)]


def _main(
    worker: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = worker(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        # gloo's threads drop tensors late, and abort if Python is ending by then. Once nothing refers to the group any
        # more (modules that FSDP2 sharded do, in cycles), destroying it waits for them.
        gc.collect()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for the others, as a crashed rank does
