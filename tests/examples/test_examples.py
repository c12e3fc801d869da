"""The examples run as their docstrings say, on two processes, and their loss falls."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.forked import run_python
from tests.helpers.launch import free_port
from tests.helpers.paths import ROOT

EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
TORCHRUN += ["--start_method=fork", "--run_path"]  # ranks find imported what torchrun has, which spares seconds each


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [str(EXAMPLES / "train_fabric.py"), "--devices", "2", "--accelerator", "cpu", "--steps", "6"],
        [*TORCHRUN, str(EXAMPLES / "train_fsdp2.py"), "--steps", "6"],
    ],
    ids=["fabric", "torchrun"],
)
def test_an_example_trains_on_two_processes(command: list[str], data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(data)
    done = run_python(command, tmp_path, MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses[0] == pytest.approx(8.33, abs=0.1)  # the logarithm of 4096 tokens
    assert losses[-1] < losses[0] - 0.5
