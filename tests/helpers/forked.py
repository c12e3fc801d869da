"""Python programs in a fork of this process, which has imported torch and Lightning already: ten seconds less each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


def run_python(
    arguments: Sequence[str], folder: Path | None = None, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` does: a script, -m and a module or -c and a program, in a process of its own.

    As `subprocess.run`, it waits for all that write where the program does.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    # A build for accelerators may start autograd's threads, which survive no fork, even where there is none.
    if sys.platform != "linux" or torch.accelerator.current_accelerator() is not None:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    out, err = os.pipe(), os.pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_become, args=(list(arguments), folder, environment, out, err))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: pytest-xdist's hold no lock that the program takes
        process.start()
    os.close(out[1])
    os.close(err[1])
    with open(out[0]) as printed, open(err[0]) as complained, ThreadPoolExecutor(2) as reading:
        texts = [reading.submit(file.read) for file in (printed, complained)]
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *(text.result() for text in texts))


def _become(
    arguments: list[str], folder: Path | None, environment: dict[str, str], out: tuple[int, int], err: tuple[int, int]
) -> None:
    for number, (read, write) in enumerate((out, err), start=1):
        os.dup2(write, number)
        os.close(read)
        os.close(write)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or os.getcwd())
    torch.set_num_threads(1)
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
