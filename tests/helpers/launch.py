"""Start real processes in a gloo group, wait no longer than a deadline, and bring their answers or errors back.

They are forked from a server that has imported what takes seconds (`preload`), and that ends with this process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing.forkserver
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.preload"])
_TOLD = 10_000  # characters of a rank's standard error, the last ones


class WorkerError(RuntimeError):
    """What the ranks raised, or that they hung."""


def free_port() -> int:
    """A port to listen on soon, from below those that the system gives out by itself.

    A port of the system's own choice is in a range from which every connection made meanwhile, gloo's among them, may
    take it before its user listens on it.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):  # not seeded: pytest's workers are alike
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port
    raise RuntimeError("none of 100 ports from 20,000 to 31,999 is free to listen on")


def serve() -> None:
    """Start the server, unless it runs. It keeps this environment: what it forks is to be given one of its own."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()


def run_ranks(worker: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call ``worker(rank, *args)`` on every rank of a new group; its results by rank.

    Raises:
        WorkerError: With every rank's message, if one raised, or if one is still running after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ranks
        call = pickle.dumps((worker, args))  # tensors by value: else each would take a file descriptor
        serve()
        for rank in range(world_size):
            _errors(folder, rank).touch()
        processes = [
            CONTEXT.Process(
                target=_main,
                args=(call, rank, folder, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
                daemon=True,
            )
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
        codes = [process.exitcode for process in processes]
        if hanging or any(codes):
            told = [_errors(folder, rank).read_text(errors="replace")[-_TOLD:] for rank in range(world_size)]
            errors = [f"rank {rank}: {text}" for rank, text in enumerate(told) if codes[rank]]
            raise WorkerError(f"hanging ranks {hanging}, exit codes {codes}\n" + "\n".join(errors))
        return [torch.load(Path(folder, f"{r}.pt"), weights_only=False) for r in range(world_size)]


def _errors(folder: str, rank: int) -> Path:
    """Where the standard error of a rank goes."""
    return Path(folder, f"{rank}.error")


def _main(call: bytes, rank: int, folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with _errors(folder, rank).open("w") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    faulthandler.enable(sys.stderr)  # a crash outside Python tells where, too
    try:
        worker, args = pickle.loads(call)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = worker(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        # gloo's threads drop tensors late, and abort if Python is ending by then. Once nothing refers to the group any
        # more (modules that FSDP2 sharded do, in cycles), destroying it waits for them.
        gc.collect()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for the others, as a crashed rank does
