"""Four processes that outlive the walks: each walk forms its own group among them, and takes it down again."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.launch import CONTEXT, serve

SIZE = 4


class PoolError(RuntimeError):
    """What ranks said, or that they hung or died; the pool is started anew."""


class Pool:
    """Processes that wait for calls.

    Args:
        timeout: Seconds that a call may take; half of it what a collective may.
    """

    def __init__(self, timeout: float = 60) -> None:
        self.timeout = timeout
        self._members: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        serve()
        for rank in range(SIZE):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, theirs, self.timeout / 2), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        for _, pipe in self._members:
            pipe.send_bytes(pickle.dumps((0, "", int, ())))
        for _, pipe in self._members:
            pipe.recv_bytes()  # importing takes as long as it takes

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._members:
            process.kill()
            process.join()
            pipe.close()
        self._members = []

    def run(self, world: int, grouped: bool, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns on each of the first ``world`` ranks.

        Args:
            world: How many ranks.
            grouped: Whether they form a process group.
            function: Called with ``args`` on each.

        Raises:
            PoolError: If one raised, hung or died.
        """
        if not self._members:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            call = pickle.dumps((world if grouped else 0, os.path.join(folder, "store"), function, args))
            for _, pipe in self._members[:world]:
                pipe.send_bytes(call)
            deadline, answers, errors = time.monotonic() + self.timeout, [], []
            for rank, (_, pipe) in enumerate(self._members[:world]):
                try:
                    if not pipe.poll(max(0.0, deadline - time.monotonic())):
                        errors.append(f"rank {rank} hung")
                        continue
                    answer, error = pickle.loads(pipe.recv_bytes())
                    answers.append(answer)
                    if error:
                        errors.append(f"rank {rank}: {error}")
                except (EOFError, OSError):
                    errors.append(f"rank {rank} died")
        if errors:
            self.close()
            raise PoolError("\n".join(errors))
        return answers


def _serve(rank: int, pipe: Any, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(EOFError):
        while True:
            world, store, function, args = pickle.loads(pipe.recv_bytes())
            answer = error = None
            try:
                if world:
                    options: dict[str, Any] = {"init_method": f"file://{store}", "rank": rank, "world_size": world}
                    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **options)
                answer = function(*args)
                gc.collect()  # modules that FSDP2 sharded refer to the group in cycles
                if world:
                    dist.destroy_process_group()
            except BaseException:
                error = traceback.format_exc()
            pipe.send_bytes(pickle.dumps((answer, error)))
