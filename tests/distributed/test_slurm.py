"""The job for SLURM as SLURM runs it, on two nodes: this machine twice. What is not here is SLURM.

`srun` and `scontrol` are stand-ins: they start the command once for each node, with the variables that SLURM sets, pass
signals on, and note what goes back into the queue. The script, torchrun, the ranks and their training are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.job import AT, SMALL_JOB, STEPS, Ended, finish, losses
from tests.helpers.launch import free_port
from tests.helpers.paths import CONFIGS, ROOT

BIN = Path(sys.executable).parent
SCRIPT = ROOT / "examples" / "slurm" / "gpt2.sbatch"
SLURM = {  # of a job of two nodes with one device each
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "gpt2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_GPUS_ON_NODE": "1",
}
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
tasks = []
for node in ("0", "1"):
    ours = dict(SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_PROCID=node, SLURM_NODEID=node, SLURM_LOCALID="0")
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | ours))
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> requeued.txt; fi
"""
# What makes the recipe that of the uninterrupted run.
LAYER = {
    "model": {"init_args": SMALL_JOB["model"]["init_args"] | {"vocab_size": 4096, "block_size": 32}},
    "data": {
        "init_args": SMALL_JOB["data"]["init_args"]
        | {"data_dir": None, "vocab_size": None, "global_batch_size": 8, "num_workers": 0}
    },
    "optim": {"schedule": {"init_args": {"warmup": 0.05, "decay": 0.3}}},
    "trainer": SMALL_JOB["trainer"] | {"precision": "32-true", "enable_progress_bar": True},
}


@pytest.fixture
def checkout(folder: Path) -> Path:
    """A folder to submit from: the recipes, an environment that leads to this one, and the stand-ins."""
    (folder / "configs").symlink_to(CONFIGS)
    (folder / "small.yaml").write_text(json.dumps(LAYER))
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{BIN}:$PATH"')
    (folder / "slurm").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "slurm" / name).write_text(text)
        (folder / "slurm" / name).chmod(0o755)
    return folder


def submit(folder: Path, *options: str, slurm: dict[str, str] = SLURM) -> Ended:
    """Run the script as sbatch does."""
    path = f"{folder / 'slurm'}:{os.environ['PATH']}"
    # a machine without a network may not know its own name
    environment = slurm | {"PATH": path, "MASTER_PORT": str(free_port()), "PET_LOCAL_ADDR": "127.0.0.1"}
    batch = ["bash", "-c", 'BATCH=$$ exec bash "$@"', "sbatch", str(SCRIPT), "small.yaml"]
    (ended,) = finish([([*batch, *options], environment)], folder)
    return ended


@pytest.mark.slow
def test_a_job_that_slurm_warns_saves_goes_back_into_the_queue_and_ends_as_if_nothing_had_been(
    checkout: Path, uninterrupted: dict[int, float]
) -> None:
    callback = "--trainer.callbacks+=tests.helpers.job.Warned"
    warned = submit(checkout, callback)
    assert warned.code != 0, warned.output
    assert (checkout / "requeued.txt").read_text() == "requeue 4711\n"
    checkpoints = checkout / "logs" / "lightning_logs" / "version_4711" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"last-sigterm-step={AT + 1}.ckpt", "run_card.md"]
    assert "- processes: 2 on 2 nodes" in (checkpoints / "run_card.md").read_text()
    curve = losses(checkout)
    done = submit(checkout, callback)
    assert done.code == 0, done.output
    assert (checkout / "requeued.txt").read_text() == "requeue 4711\n"
    curve |= losses(checkout, AT + 1)
    assert len(curve) == STEPS - 1  # the step that saved ends before its loss is logged
    assert curve == pytest.approx({step: uninterrupted[step] for step in curve}, rel=1e-4, abs=0)


@pytest.mark.parametrize(("gpus", "processes"), [({}, "8"), ({"SLURM_GPUS_ON_NODE": "4"}, "4")])
def test_a_job_has_a_process_for_each_gpu_of_a_node(checkout: Path, gpus: dict[str, str], processes: str) -> None:
    (checkout / "slurm" / "srun").write_text('#!/bin/bash\necho "$@"')
    slurm = {key: value for key, value in SLURM.items() if key != "SLURM_GPUS_ON_NODE"} | gpus
    ended = submit(checkout, slurm=slurm)
    assert f"torchrun --nnodes 2 --nproc_per_node {processes} " in ended.output
    assert f"--trainer.devices {processes} " in ended.output


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([BIN / "shellcheck", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
