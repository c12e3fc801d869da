"""The examples run as their docstrings say, on two processes, and their loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, str(EXAMPLES / "train_fabric.py"), "--devices", "2", "--accelerator", "cpu", "--steps", "6"],
        [*TORCHRUN, str(EXAMPLES / "train_fsdp2.py"), "--steps", "6"],
    ],
    ids=["fabric", "torchrun"],
)
def test_an_example_trains_on_two_processes(command: list[str], tmp_path: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run(command, tmp_path))]
    assert losses[0] == pytest.approx(8.33, abs=0.1)  # the logarithm of 4096 tokens
    assert losses[-1] < losses[0] - 0.5
