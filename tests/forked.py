"""Python programs in a fork of this process, which has imported torch and Lightning already: that saves seconds each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch


def run_python(
    arguments: Sequence[str], folder: Path | None = None, timeout: float = 150, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` does: a script or a module with its arguments, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if sys.platform != "linux" or torch.accelerator.is_available():  # its threads do not survive a fork
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=_become, args=(list(arguments), folder, environment, out, err))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: pytest-xdist's hold no lock that the program takes
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read(), err.read())


def _become(arguments: list[str], folder: Path | None, environment: dict[str, str], out: IO[str], err: IO[str]) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder or os.getcwd())
    torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
