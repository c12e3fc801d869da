"""What a fault does to a job of two processes: it ends in time with a message, and goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_namo import OptimizerCallback
from tests.helpers.job import AT, EVERY, LAST, STEPS, command, finish, losses, run_agents, run_job, succeed
from tests.helpers.launch import WorkerError, run_ranks

SIGTERMED = 143
# Sharded training rounds otherwise, by 5e-6 here. One repeated or skipped batch, or a lost momentum, is above 1e-3.
TOLERANCE = {"ddp": 0.0, "fsdp2": 1e-4}


def check_losses(folder: Path, expected: dict[int, float], strategy: str = "ddp", start: int = 0) -> None:
    """The steps from ``start`` to the last, each as in the uninterrupted run."""
    rest = {step: loss for step, loss in expected.items() if step >= start}
    assert len(rest) == STEPS - start
    assert losses(folder, start) == pytest.approx(rest, rel=TOLERANCE[strategy], abs=0)


@pytest.mark.slow
def test_the_others_end_when_a_rank_is_killed_and_the_last_checkpoint_goes_on(
    folder: Path, uninterrupted: dict[int, float]
) -> None:
    survivor, killed = run_job(folder, fault="Killed")
    assert killed.code == -9
    assert survivor.code == 1
    assert "RuntimeError" in survivor.output
    # gloo's message, up to torch 2.12 and since; NCCL has a timeout instead, and torchrun ends the rank
    assert re.search("by peer|remote worker", survivor.output)
    assert os.readlink(folder / "saved" / "last.ckpt") == f"step={AT}.ckpt"
    succeed(run_job(folder, *LAST))
    check_losses(folder, uninterrupted, start=AT)


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_from_the_last_checkpoint(folder: Path, uninterrupted: dict[int, float]) -> None:
    succeed(run_agents(folder, *LAST, fault="KilledOnce", restarts=1))
    assert (folder / "killed").exists()
    check_losses(folder, uninterrupted, start=AT)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sigterm_saves_the_step_at_hand_and_the_job_goes_on_from_there(
    strategy: str, folder: Path, uninterrupted: dict[int, float]
) -> None:
    for rank in run_job(folder, fault="Preempted", strategy=strategy):
        assert rank.code == SIGTERMED, rank.output
    assert not list(folder.glob("saved/*.unfinished"))
    assert (folder / "saved" / f"last-sigterm-step={AT + 1}.ckpt").exists()
    succeed(run_job(folder, *LAST, strategy=strategy))
    check_losses(folder, uninterrupted, strategy, start=AT + 1)


@pytest.mark.slow
def test_a_full_disk_ends_the_job_and_leaves_the_last_checkpoint_whole(folder: Path, whole_run: Path) -> None:
    for rank in run_job(folder, fault="FullDisk"):
        assert rank.code == 1, rank.output
    assert sorted(path.name for path in (folder / "saved").iterdir()) == ["last.ckpt", "step=2.ckpt", f"step={AT}.ckpt"]
    last, expected = (
        torch.load(path, weights_only=True)
        for path in (folder / "saved" / "last.ckpt", whole_run / "saved" / f"step={AT}.ckpt")
    )
    torch.testing.assert_close(last["state_dict"], expected["state_dict"], rtol=0, atol=0)
    ours, theirs = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (last, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert last["TextDataModule"] == expected["TextDataModule"]


@pytest.mark.slow
def test_a_full_disk_leaves_no_sharded_checkpoint_that_is_not_whole(
    folder: Path, uninterrupted: dict[int, float]
) -> None:
    for rank in run_job(folder, fault="FullDisk", strategy="fsdp2"):
        assert rank.code == 1, rank.output
    torn = folder / "saved" / f"step={AT + EVERY}.ckpt"
    assert list(torn.iterdir())
    assert not (torn / ".metadata").exists()  # written last; without it nobody takes the folder for a checkpoint
    succeed(run_job(folder, *LAST, strategy="fsdp2"))
    check_losses(folder, uninterrupted, "fsdp2", start=AT)


@pytest.mark.slow
def test_nan_on_one_rank_skips_one_step_on_all_ranks(folder: Path, uninterrupted: dict[int, float]) -> None:
    ended = run_job(folder, fault="NotANumber")
    succeed(ended)
    # eight matrices and AdamW's group
    assert f"9 updates of matrices or AdamW groups were skipped since step {AT}" in ended[0].output
    curve = losses(folder)
    assert [step for step, loss in curve.items() if loss != loss] == [AT]
    assert {step: loss for step, loss in curve.items() if step < AT} == {s: uninterrupted[s] for s in range(AT)}
    assert curve[STEPS - 1] < curve[AT - 1] - 0.1
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(state["step"] == STEPS - 1 for state in first["optimizer"].values())


def test_another_model_on_one_rank_is_named_on_all_ranks_and_fsdp2_does_not_hang(folder: Path) -> None:
    for rank in run_job(folder, fault="AnotherModel", strategy="fsdp2"):
        assert rank.code == 2, rank.output
        assert "rank 1 has" in rank.output
        assert "model.transformer.h.2." in rank.output
        assert "process group: False" in rank.output  # else gloo's threads abort some programs as they end


@pytest.mark.slow
def test_a_port_in_use_is_named_before_any_process_is_started(folder: Path) -> None:
    job = [sys.executable, "-m", "lightning_namo", *command("ddp", 1, 2, None, [])]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (ended,) = finish([(job, {"MASTER_PORT": str(port)})], folder, timeout=60)
    assert ended.code == 2, ended.output
    assert f"lightning-namo: error: Expected port {port}, where the processes are to meet, to be free." in ended.output
    assert "Traceback" not in ended.output
    assert not ended.leftovers


class Unequal(pl.LightningModule):
    """Built in its constructor, as most modules are, with a layer more on rank 1."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2 + rank)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()


def fit_unequal(rank: int) -> None:
    os.environ.update(NODE_RANK="0")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, callbacks=[OptimizerCallback()]
    )
    trainer.fit(Unequal(rank), DataLoader(torch.ones(2, 4)))


def test_ddp_does_not_get_to_refuse_another_model_without_a_name() -> None:
    with pytest.raises(WorkerError) as error:
        run_ranks(fit_unequal, 2, timeout=60)
    assert str(error.value).count("rank 0 has 4 and rank 1 has 6: only rank 1 has layers.2.weight (4, 4)") == 2
