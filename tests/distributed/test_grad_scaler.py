"""Gradient scalers on real processes: an inf on one rank's shard skips the step on all ranks, or ends the job.

What torch 2.13 does with an inf that only one rank sees:

- FSDP2: agrees, over the mesh of the first gradient (`torch.distributed.tensor._dispatch.found_inf_reduce_handler`).
- FSDP1: `torch.amp.GradScaler` does not agree, and AdamW's ranks part in silence; `ShardedGradScaler`, which
  Lightning's FSDP precision takes, does.
- FSDP2 with tensor parallelism: the mesh of the first gradient need not hold all ranks.
- Tensor parallelism alone: the scaler refuses DTensors beside plain parameters.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import AdamW

from lightning_namo import build_optimizer
from lightning_namo.testing.layouts import LAYOUTS, gathered_weights, new_module, prescribed_gradients
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.rules import RULES
from tests.helpers.worker import clean, local

OPTIMIZERS: dict[str, Any] = {**RULES, "AdamW": AdamW}
SCALERS = {"GradScaler": GradScaler, "ShardedGradScaler": ShardedGradScaler}
STEPS, POISONED = 4, 2


def train(layout: str, cls: str, scaler: str, victim: str, poison: bool) -> dict[str, Any]:
    """Train under a scaler; in one step the last rank finds an inf in its shard of the victim."""
    kind, wrap = LAYOUTS[layout]
    plain = new_module(kind, torch.float32)
    grads = [prescribed_gradients(plain, step) for step in range(STEPS)]
    if not poison:
        del grads[POISONED]
    module = wrap(plain)
    if cls == "AdamW":
        optimizer: torch.optim.Optimizer = AdamW(module.parameters(), lr=0.05)
    else:
        optimizer = build_optimizer(module, OPTIMIZERS[cls], lr=0.05, blocks=kind.blocks)
    scaling = SCALERS[scaler]("cpu", init_scale=2.0**10)
    stepped = []
    for step, of_step in enumerate(grads):
        optimizer.zero_grad()
        scaling.scale(module(of_step)).backward()
        if poison and step == POISONED and dist.get_rank() == dist.get_world_size() - 1:
            shards = [local(p.grad) for n, p in module.named_parameters() if victim in clean(n) and p.grad is not None]
            next(shard for shard in shards if shard.numel()).view(-1)[0] = torch.inf
        state = (value for of in optimizer.state.values() for value in of.values())
        tensors = [*module.parameters(), *state]
        before = [local(tensor).detach().clone() for tensor in tensors]
        scaling.step(optimizer)
        scaling.update()
        same = [torch.equal(local(t), b) for t, b in zip(tensors, before, strict=True)]
        stepped.append(not all(same))
    return {"stepped": stepped, "scale": scaling.get_scale(), "weights": gathered_weights(module)}


def cases(rank: int, layout: str, scaler: str, victim: str, names: list[str]) -> dict[str, Any]:
    return {name: [train(layout, name, scaler, victim, poison) for poison in (True, False)] for name in names}


@functools.cache
def answers(layout: str, scaler: str, victim: str) -> list[dict[str, Any]]:
    return run_ranks(cases, 2, layout, scaler, victim, list(OPTIMIZERS), timeout=150)


def by_rank(rank: int) -> dict[str, list[bool]]:
    names = ("NAMO", "AdamW")
    return {name: train("fsdp2+tp", name, "GradScaler", "wide.layer.weight", True)["stepped"] for name in names}


AGREEING = [
    ("fsdp2-even", "GradScaler", "tall.layer.weight"),
    pytest.param("fsdp2-uneven", "GradScaler", "norm.layer.bias", marks=pytest.mark.slow),
    pytest.param("fsdp1", "ShardedGradScaler", "fused.layer.weight", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(("layout", "scaler", "victim"), AGREEING)
def test_an_inf_on_one_rank_skips_the_step_on_all(layout: str, scaler: str, victim: str, cls: str) -> None:
    for answer in answers(layout, scaler, victim):
        poisoned, without = answer[cls]
        assert poisoned["stepped"] == [step != POISONED for step in range(STEPS)]
        assert poisoned["scale"] == 2.0**9
        assert without["stepped"] == [True] * (STEPS - 1)
        torch.testing.assert_close(poisoned["weights"], without["weights"], rtol=0, atol=0)


def impatient(rank: int, layout: str, scaler: str, victim: str, cls: str) -> dict[str, Any]:
    """A rank that waits for others in vain ends after five seconds, in place of the usual minutes."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)
    return train(layout, cls, scaler, victim, poison=True)


def test_adamw_s_ranks_part_in_silence_where_the_scaler_does_not_make_them_agree() -> None:
    """A limit of torch: under FSDP1 take ShardedGradScaler, as Lightning does. If this fails, torch has mended it."""
    first, last = run_ranks(impatient, 2, "fsdp1", "GradScaler", "fused", "AdamW", timeout=90)
    assert (first["stepped"][POISONED], last["stepped"][POISONED]) == (True, False)
    assert (first["scale"], last["scale"]) == (2.0**10, 2.0**9)


def test_where_ranks_part_the_job_ends_with_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerError, match=r"hanging ranks \[\]") as error:
        run_ranks(impatient, 2, "fsdp1", "GradScaler", "fused", "NAMO", timeout=90)
    assert "Timed out" in str(error.value)


@pytest.mark.slow
def test_under_fsdp2_with_tensor_parallelism_the_first_gradient_decides_who_agrees() -> None:
    """Ours is a matrix that both divide; AdamW's is the embedding, over whose mesh half of the ranks learn of it."""
    found = run_ranks(by_rank, 4, timeout=150)
    assert [answer["NAMO"][POISONED] for answer in found] == [False] * 4
    assert [answer["AdamW"][POISONED] for answer in found] == [True, False, True, False]


def test_the_scaler_refuses_tensor_parallel_parameters_beside_plain_ones() -> None:
    with pytest.raises(WorkerError, match=r"hanging ranks \[\](.|\n)*got mixed torch\.Tensor and DTensor"):
        run_ranks(impatient, 2, "tp", "GradScaler", "tall", "NAMO", timeout=90)
