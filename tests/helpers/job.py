"""A training job as users start it, the command line on several processes, with faults to order.

`lightning-namo` and `torchrun` are forked from the server of `launch`, which spares a process ten seconds of imports.
The program that users start, which imports for itself, runs in test_slurm, test_gpt2_parallel and test_quickstart.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.helpers.launch import free_port, serve
from tests.helpers.paths import CONFIGS, ROOT

STEPS, EVERY = 8, 2  # a checkpoint every two steps
SMALL_JOB: dict[str, Any] = {
    "model": {"init_args": {"n_layer": 2, "n_head": 4, "n_embd": 32}},
    "data": {"init_args": {"batch_size": 4, "block_size": 32}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
    },
}
SAVING = {  # what docs/checkpoints.md recommends
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "dirpath": "saved",
        "filename": "{step}",
        "every_n_train_steps": EVERY,
        "save_top_k": -1,
        "save_last": "link",
    },
}
LAST = ("--ckpt_path", "last")
MAINS = {  # of the commands that are forked
    "lightning-namo": "lightning_namo.cli",
    "torchrun": "torch.distributed.run",
}


@dataclasses.dataclass
class Ended:
    """A process that ended: its exit code, negative for a signal, what it printed, whether it left others behind."""

    code: int
    output: str
    leftovers: bool


def command(strategy: str, nodes: int, devices: int, fault: str | None, options: Sequence[str]) -> list[str]:
    """The command line of a small GPT-2, with a fault of this module among its callbacks."""
    callbacks: list[Any] = [SAVING]
    if fault is not None:
        callbacks.append({"class_path": f"{__name__}.{fault}"})
    trainer = {"callbacks": callbacks, "num_nodes": nodes, "devices": devices}
    layers = [CONFIGS / "quickstart.yaml", CONFIGS / "strategy" / f"{strategy}.yaml"]
    layers += [json.dumps(SMALL_JOB | {"trainer": SMALL_JOB["trainer"] | trainer})]
    configs = [f"--config={layer}" for layer in layers]
    return ["fit", *configs, *options]


def run_job(
    folder: Path, *options: str, strategy: str = "ddp", devices: int = 2, fault: str | None = None
) -> list[Ended]:
    """A process for each rank, as a scheduler starts them; the ranks in order."""
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(devices)}
    job = ["lightning-namo", *command(strategy, 1, devices, fault, options)]
    return finish([(job, ranks | {"LOCAL_RANK": str(rank)}) for rank in range(devices)], folder)


def run_agents(
    folder: Path,
    *options: str,
    strategy: str = "ddp",
    nodes: int = 1,
    devices: int = 2,
    fault: str | None = None,
    restarts: int = 0,
) -> list[Ended]:
    """A torchrun for each node; the agents in order. Each forks its ranks, which find imported what it has."""
    torchrun = ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={devices}"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    torchrun += [f"--max_restarts={restarts}", "--start_method=fork", "--run_path"]
    torchrun += [str(ROOT / "lightning_namo" / "__main__.py")]
    # Else torchrun gives restarted ranks the store of the dead ones, whose addresses they may take (pytorch #135712).
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return finish([([*torchrun, *command(strategy, nodes, devices, fault, options)], own)] * nodes, folder)


class Forked(ForkServerProcess):
    """A command of `MAINS`, forked from the server that has imported what it needs; used as a `subprocess.Popen`."""

    def __init__(self, job: list[str], folder: Path, environment: dict[str, str], output: str) -> None:
        super().__init__()
        self.job, self.folder, self.environment, self.output = job, folder, environment, output
        serve()
        self.start()

    def run(self) -> None:
        os.setsid()
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        with open(self.output, "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = self.job
        try:
            importlib.import_module(MAINS[self.job[0]]).main(self.job[1:])
        finally:
            atexit._run_exitfuncs()  # as Python does when it ends

    def wait(self, timeout: float | None = None) -> None:
        self.join(timeout)
        if self.is_alive():
            raise subprocess.TimeoutExpired(self.job, timeout or 0)

    @property
    def returncode(self) -> int:
        assert self.exitcode is not None
        return self.exitcode


def start(job: list[str], folder: Path, environment: dict[str, str], output: str) -> subprocess.Popen[bytes] | Forked:
    """A process in a session of its own, which writes to a file."""
    if job[0] in MAINS:
        return Forked(job, folder, environment, output)
    with open(output, "a") as out:
        return subprocess.Popen(
            job, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(commands: list[tuple[list[str], dict[str, str]]], folder: Path, timeout: float = 120) -> list[Ended]:
    """Run commands, each with variables of its own, side by side in a folder; an AssertionError if one hangs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    outputs = [folder / f"output-{number}.txt" for number in range(len(commands))]
    for output in outputs:
        output.unlink(missing_ok=True)
    processes = [
        start(job, folder, environment | own, str(output)) for (job, own), output in zip(commands, outputs, strict=True)
    ]
    deadline = time.monotonic() + timeout
    hanging = False
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            hanging = True
    # An agent ends its ranks, which are in sessions of their own.
    leftovers = [_signal_group(process, signal.SIGTERM) for process in processes]
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        _signal_group(process, signal.SIGKILL)
        process.wait()
    texts = [output.read_text() for output in outputs]
    assert not hanging, "\n".join(texts)
    return [Ended(*each) for each in zip((process.returncode for process in processes), texts, leftovers, strict=True)]


def _signal_group(leader: subprocess.Popen[bytes] | Forked, number: signal.Signals) -> bool:
    """Whether there was anybody to signal: the process or what it started."""
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True


def succeed(ended: list[Ended]) -> None:
    for process in ended:
        assert process.code == 0, process.output


def losses(folder: Path, start: int = 0) -> dict[int, float]:
    """The training loss by step as the last start of the job logged it, which must begin with the step ``start``."""
    last = max(folder.glob("logs/lightning_logs/version_*"), key=lambda path: int(path.name.split("_")[1]))
    with (last / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]  # others are of callbacks
    curve = {int(row["step"]): float(row["train/loss"]) for row in rows}
    assert min(curve) == start
    return curve


# ---------------------------------------------------------------------- faults, at step AT, after the second checkpoint

AT = 2 * EVERY
VICTIM = 1


class Fault(pl.Callback, ABC):
    """Strikes one rank mid-step: after its backward pass, before the optimizer's exchange."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == AT and trainer.global_rank == VICTIM:
            self.strike(pl_module)

    @abstractmethod
    def strike(self, module: pl.LightningModule) -> None: ...


class Killed(Fault):
    def strike(self, module: pl.LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KilledOnce(Fault):
    """The first time, as a file says; not after the restart."""

    def strike(self, module: pl.LightningModule) -> None:
        try:
            Path("killed").touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class Preempted(Fault):
    """SIGTERM to all ranks, each of which is somewhere else in the step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if trainer.global_step == AT and trainer.global_rank != VICTIM:
            os.kill(os.getpid(), signal.SIGTERM)

    def strike(self, module: pl.LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Warned(Fault):
    """SIGTERM to the batch script alone, as SLURM does; the step goes on once the signal has come here by its ways."""

    def strike(self, module: pl.LightningModule) -> None:
        received, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        before = signal.set_wakeup_fd(wakeup)
        os.kill(int(os.environ["BATCH"]), signal.SIGTERM)
        os.read(received, 1)
        signal.set_wakeup_fd(before)


class NotANumber(pl.Callback):
    """One rank's activations, and so its loss and gradients, are NaN in one step; at the end every rank's weights."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if trainer.global_step == AT and trainer.global_rank == VICTIM:
            block = pl_module.model.transformer["h"][0]
            self.hook = block.register_forward_hook(lambda module, inputs, output: output * torch.nan)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == AT and trainer.global_rank == VICTIM:
            self.hook.remove()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        replica = {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        torch.save(replica, f"rank-{trainer.global_rank}.pt")


class AnotherModel(pl.Callback):
    """One rank's network has one block more; says, when Python ends, whether a process group was left standing."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        atexit.register(lambda: print("process group:", torch.distributed.is_initialized()))
        if trainer.global_rank == VICTIM:
            pl_module.config = dataclasses.replace(pl_module.config, n_layer=pl_module.config.n_layer + 1)


class FullDisk(pl.Callback):
    """From the second checkpoint on no file may grow beyond 64 kB: write fails with EFBIG as it would with ENOSPC."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if trainer.global_step == AT:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
