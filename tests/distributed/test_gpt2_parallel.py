"""GPT-2 through the command line on two and four processes: every strategy's config trains as one process does."""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lightning_namo.cli import main
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module
from lightning_namo.sharding.local import local_tensor
from tests.helpers.launch import run_ranks
from tests.helpers.paths import CONFIGS
from tests.helpers.worker import clean

STEPS, BATCH = 6, 8  # sequences of 32 tokens in a global batch
LAYER = {
    "model": {"init_args": {"n_layer": 2, "n_embd": 64}},
    "data": {"init_args": {"block_size": 32}},
    "optim": {"optimizer": {"init_args": {"orthogonalizer": "svd"}}, "schedule": None},
    "trainer": {
        "max_steps": STEPS,
        "val_check_interval": 1,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
    },
}
COMMON = [  # gradients are clipped, as in the quickstart
    "fit",
    f"--config={CONFIGS / 'quickstart.yaml'}",
    "--config=" + json.dumps(LAYER),
]
FEW = json.dumps(  # a token at a time takes most of a run where several processes share two cores
    [
        {"class_path": "lightning_namo.gpt2.summary.TokenThroughput", "init_args": {"window_size": 2}},
        {"class_path": "lightning_namo.gpt2.summary.RunSummary", "init_args": {"sample_tokens": 4}},
    ]
)
ON_CPU = "--trainer.strategy.class_path=tests.helpers.strategies.CPUFSDPStrategy"
ONE_FILE = "--trainer.strategy.save_distributed_checkpoint=false"
CHECKPOINTING, COMPILE = "--model.activation_checkpointing=true", "--model.compile=true"
SAVE = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.every_n_train_steps={STEPS}"]  # else each step


def layer(strategy: str) -> str:
    return f"--config={CONFIGS / 'strategy' / strategy}.yaml"


@dataclass(frozen=True)
class Case:
    """A run of the command line, and what it must equal.

    Args:
        processes: How many.
        shares: Ranks that read different batches.
        options: On top of `COMMON`.
        rows: The shape of the first c_attn, (192, 64), on rank 0.
        reference: The run on one process with the same losses.
        tolerance: Relative, of every loss.
    """

    processes: int
    shares: int
    options: tuple[str, ...]
    local: tuple[int, ...] = (192, 64)
    reference: str = "one"
    tolerance: float = 1e-6


DDP = Case(2, 2, (layer("ddp"),))
FSDP1 = Case(2, 2, (layer("fsdp1"), ON_CPU), local=(12288,))  # a run, here of all its numbers: half a block has more
FSDP2 = Case(2, 2, (layer("fsdp2"),), local=(96, 64))
TP = Case(2, 1, (layer("fsdp2_tp"), "--model.bias=true"), local=(96, 64), reference="one-bias")
HSDP = Case(4, 4, (layer("hsdp"),), local=(96, 64))
FSDP2_TP = Case(4, 2, (layer("fsdp2_tp"),), local=(48, 64))


def but(case: Case, *options: str, **changes: Any) -> Case:
    return Case(**{**vars(case), "options": (*case.options, *options), **changes})


CASES = {
    "one": Case(1, 1, ()),
    "one-bias": Case(1, 1, ("--model.bias=true",)),
    "ddp": DDP,
    "ddp-checkpointing": but(DDP, CHECKPOINTING),
    "fsdp1": FSDP1,
    "fsdp1-checkpointing": but(FSDP1, CHECKPOINTING),
    "fsdp2": FSDP2,
    "fsdp2-checkpointing": but(FSDP2, CHECKPOINTING),
    "fsdp2-compile": but(FSDP2, COMPILE, CHECKPOINTING),
    "fsdp2-bf16": but(FSDP2, "--trainer.precision=bf16-mixed", tolerance=1e-3),
    "tp": TP,
    "tp-compile": but(TP, COMPILE),
    "hsdp": HSDP,
    "hsdp-checkpointing": but(HSDP, CHECKPOINTING),
    "fsdp2_tp": but(FSDP2_TP, ONE_FILE),
    "fsdp2_tp-checkpointing": but(FSDP2_TP, CHECKPOINTING),
    "hsdp_tp": but(FSDP2_TP, "--model.replicas=2", local=(96, 64)),
}


class LayoutRecorder(pl.Callback):
    """Keeps how the network was laid out in the last run of this process."""

    last: dict[str, Any]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net, root = pl_module.model, trainer.strategy.model
        units = [module for module in root.modules() if isinstance(module, FSDPModule | FSDP)]
        blocks = [getattr(block, "_fsdp_wrapped_module", block) for block in net.transformer["h"]]
        parameters = {clean(name): local_tensor(parameter) for name, parameter in net.named_parameters()}
        policies = [unit._get_fsdp_state()._mp_policy for unit in units if isinstance(unit, FSDPModule)]
        LayoutRecorder.last = {
            "names": list(parameters),
            "local": tuple(parameters["transformer.h.0.attn.c_attn.weight"].shape),
            "units": len(units),
            "tied": net.lm_head.weight is net.transformer["wte"].weight,
            "checkpointing": [block.activation_checkpointing for block in blocks],
            "compiled": [block._compiled_call_impl is not None for block in blocks],
            "graph_breaks": dict(torch._dynamo.utils.counters["graph_break"]),
            "dtypes": {policy.param_dtype for policy in policies},
        }


def command(name: str) -> list[str]:
    case = CASES[name]
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: ., name: runs, version: {name}}}}}"
    devices, batch = f"--trainer.devices={case.processes}", f"--data.batch_size={BATCH // case.shares}"
    return [*COMMON, f"--trainer.callbacks={FEW}", *SAVE, *case.options, devices, batch, f"--trainer.logger={logger}"]


def train(rank: int, folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Run the cases one after the other, as ranks that were started from outside."""
    os.environ.update(NODE_RANK="0")
    os.chdir(folder)
    facts = {}
    # The compiler's default backend takes half a minute on a CPU; what it is given is the same.
    quick = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    with mock.patch.object(nn.Module, "compile", quick):
        for name in names:
            torch._dynamo.reset()  # of networks of earlier cases
            gc.collect()  # and their process groups, which else end in the middle of a case, with its threads at work
            main([*command(name), f"--trainer.callbacks+={__name__}.LayoutRecorder"])
            facts[name] = LayoutRecorder.last
    return facts


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    with (folder / "runs" / name / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(key, int(row["step"])): float(row[key]) for row in rows for key in ("train/loss", "val/loss") if row[key]}


Facts = dict[str, dict[str, Any]]


def train_on(processes: int, folder: Path, names: set[str]) -> Facts:
    """Run those of the cases that are on so many processes, and say how the network lay on rank 0 in each."""
    of_processes = [name for name, case in CASES.items() if case.processes == processes and name in names]
    return run_ranks(train, processes, str(folder), of_processes, timeout=280)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs on one process are; they make the token files."""
    path = tmp_path_factory.mktemp("gpt2")
    train_on(1, path, set(CASES))
    return path


@pytest.fixture(scope="module")
def names(selected: list[dict[str, Any]]) -> set[str]:
    return {case["name"] for case in selected if "name" in case}


@pytest.fixture(scope="module")
def on_2(folder: Path, names: set[str]) -> Facts:
    return train_on(2, folder, names)


@pytest.fixture(scope="module")
def on_4(folder: Path, names: set[str]) -> Facts:
    return train_on(4, folder, names | {"fsdp2_tp"})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("fsdp2", "tp") else pytest.mark.slow)
        for name, case in CASES.items()
        if case.processes > 1
    ],
)
def test_losses_of_a_strategy_are_those_of_one_process(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    facts = request.getfixturevalue(f"on_{case.processes}")[name]
    ours, expected = losses(folder, name), losses(folder, case.reference)
    assert len(expected) == 2 * STEPS
    assert expected["val/loss", STEPS - 1] < expected["val/loss", 0] - 0.5
    assert ours == pytest.approx(expected, rel=case.tolerance, abs=0)
    config = GPT2Config(n_layer=2, bias=case.reference == "one-bias")
    with torch.device("meta"):
        assert facts["names"] == [key for key, _ in GPT2(config).named_parameters()]
    assert facts["tied"] or "fsdp1" in name
    assert facts["local"] == case.local
    assert facts["units"] == (0 if name.startswith("ddp") else 3)
    assert facts["checkpointing"] == [CHECKPOINTING in case.options] * 2
    assert facts["compiled"] == [COMPILE in case.options] * 2
    assert facts["graph_breaks"] == {}
    if "fsdp2-bf16" in name:
        assert facts["dtypes"] == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.usefixtures("on_4")
def test_a_full_checkpoint_of_shards_is_that_of_one_process(folder: Path) -> None:
    (ours,), (theirs,) = ((folder / "runs" / name).glob("checkpoints/*.ckpt") for name in ("fsdp2_tp", "one"))
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (ours, theirs)]
    assert list(states[0]) == list(states[1])
    torch.testing.assert_close(*states, rtol=0, atol=5e-5)  # a wrong order of rows would be off by 0.02
    assert GPT2Module.load_from_checkpoint(ours).config.n_layer == 2


@pytest.mark.slow
def test_a_command_launches_its_own_processes(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_namo", *command("fsdp2"), "--trainer.logger.init_args.version=launched"],
        cwd=folder,
        env=environment,
        timeout=120,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Validation perplexity") == 1
    assert losses(folder, "launched") == pytest.approx(losses(folder, "one"), rel=1e-6, abs=0)


# ---------------------------------------------------------------------- what cannot be divided


WRONG = {
    "Expected n_head to be a multiple of tensor_parallel_size = 2. Got 1.": (
        layer("fsdp2_tp"),
        "--model.n_head=1",
    ),
    "Expected replicas to divide the 2 data-parallel ranks. Got 3.": (layer("hsdp"), "--model.replicas=3"),
    "Expected replicas of 1 without a ModelParallelStrategy. Got 2.": (layer("ddp"), "--model.replicas=2"),
    "Expected compile or activation_checkpointing, not both, where tensor_parallel_size is above 1": (
        layer("fsdp2_tp"),
        COMPILE,
        CHECKPOINTING,
    ),
    "Expected data_parallel_size * tensor_parallel_size = 1 * 3 to be the number of processes": (
        layer("fsdp2_tp"),
        "--trainer.strategy.tensor_parallel_size=3",
    ),
}


def refuse(rank: int, folder: str) -> list[tuple[object, str]]:
    os.environ.update(NODE_RANK="0")
    os.chdir(folder)
    said = []
    for options in WRONG.values():
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                main([*COMMON, *options, "--trainer.devices=2", "--trainer.logger=false", "--trainer.callbacks=null"])
            except SystemExit as stop:
                said.append((stop.code, err.getvalue()))
    return said


def test_what_cannot_be_divided_is_one_line_on_every_rank(folder: Path) -> None:
    for said in run_ranks(refuse, 2, str(folder), timeout=60):
        assert len(said) == len(WRONG)
        for (code, message), expected in zip(said, WRONG, strict=True):
            assert code == 2
            line = message.strip().splitlines()[-1]
            assert line.startswith(f"lightning-namo: error: {expected}")


# ---------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_keeps_one_tensor_of_a_block_and_changes_no_gradient(dropout: float) -> None:
    sizes = []
    gradients = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT2(GPT2Config(64, 16, 1, 2, 8, dropout=dropout), activation_checkpointing=activation_checkpointing)
        saved: list[int] = []
        (block,) = model.transformer["h"]
        x = torch.randn(2, 16, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            y = block(x)
        y.square().sum().backward()
        sizes.append(sum(saved))
        gradients.append([p.grad for p in block.parameters()])
    assert sizes[1] <= x.numel() < sizes[0] / 10
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
