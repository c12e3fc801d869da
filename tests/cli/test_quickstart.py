"""The quickstart as a user runs it: the console script, its TensorBoard curves, its table, and resuming."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.forked import run_python
from tests.helpers.paths import CONFIGS

pytestmark = pytest.mark.slow

CONFIG = CONFIGS / "quickstart.yaml"
STEPS, SAVED, BATCH = 30, 15, 4  # of steps, both inside the first pass over the data; a quarter of the config's batch
SHORT = (
    f"--data.batch_size={BATCH}",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=10",
    "--trainer.limit_val_batches=4",
    "--trainer.callbacks+=ModelCheckpoint",
    f"--trainer.callbacks.every_n_train_steps={SAVED}",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.dirpath=saved",
)


@dataclass
class Run:
    """A finished run: what it printed, its curves as {step: value}, its checkpoints."""

    output: str
    folder: Path

    def curve(self, tag: str) -> dict[int, float]:
        (events,) = self.folder.glob("runs/quickstart/version_0/events*")
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
        accumulator.Reload()
        return {event.step: event.value for event in accumulator.Scalars(tag)}

    def checkpoint(self, step: int) -> Path:
        (path,) = self.folder.glob(f"saved/*step={step}.ckpt")
        return path


def run(folder: Path, *options: str, fork: bool = False) -> Run:
    """Run the console script, or the same in a fork, which takes less time to begin."""
    script = Path(sys.executable).with_name("lightning-namo")
    command = [str(script), "fit", "--config", str(CONFIG), *SHORT, *options]
    environment = {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}  # threads cost more than they bring here
    if fork:
        done = run_python(command, folder, **environment)
    else:
        environment = os.environ | environment
        done = subprocess.run(command, cwd=folder, env=environment, timeout=280, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return Run(done.stdout + done.stderr, folder)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("quickstart"))


def test_training_loss_is_logged_at_least_every_10_steps_and_falls(quickstart: Run) -> None:
    curve = quickstart.curve("train/loss")
    steps = [-1, *sorted(curve), STEPS - 1]
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 10
    assert curve[max(curve)] < curve[min(curve)] - 0.5 < math.log(4096) - 0.5  # the loss of a uniform guess


def test_perplexity_is_the_exponential_of_the_validation_loss(quickstart: Run) -> None:
    losses, perplexities = quickstart.curve("val/loss"), quickstart.curve("val/perplexity")
    assert len(losses) == STEPS // 10
    assert list(losses.values()) == sorted(losses.values(), reverse=True)
    assert perplexities == pytest.approx({step: math.exp(loss) for step, loss in losses.items()}, rel=1e-5)


def test_the_table_and_a_sample_close_the_output(quickstart: Run) -> None:
    table = quickstart.output[quickstart.output.rindex("Steps") :]
    rows = dict(re.findall(r"(Steps|Tokens|Time|Validation loss|Validation perplexity|Sample) +│ +(.+?) *│", table))
    assert rows["Steps"] == str(STEPS)
    assert rows["Tokens"] == f"{STEPS * BATCH * 128:,}"
    assert float(rows["Time"].removesuffix(" s").replace(",", "")) > 0
    losses = quickstart.curve("val/loss")
    assert float(rows["Validation loss"]) == pytest.approx(losses[max(losses)], abs=1e-4)
    assert float(rows["Validation perplexity"].replace(",", "")) == pytest.approx(
        math.exp(losses[max(losses)]), abs=0.02
    )
    assert rows["Sample"].startswith("My fellow Americans")


def test_the_routing_table_says_where_every_parameter_went(quickstart: Run) -> None:
    assert "NAMOD trains the parameters of GPT2Module so:" in quickstart.output
    assert re.search(r"h\.3\.mlp\.c_proj\.weight +128 x 512 +matrices +sure +matrix\n", quickstart.output)
    assert re.search(
        r"wte\.weight +4096 x 128 +adamw +sure +embedding, tied to model\.lm_head\.weight\n", quickstart.output
    )


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(quickstart: Run, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(quickstart.folder / "data")
    resumed = run(tmp_path, f"--ckpt_path={quickstart.checkpoint(SAVED)}", fork=True)
    for tag in ("train/loss", "val/loss"):
        whole, rest = quickstart.curve(tag), resumed.curve(tag)
        assert rest == {step: loss for step, loss in whole.items() if step >= SAVED}
        assert len(rest) >= 2
    ours, theirs = (torch.load(r.checkpoint(STEPS), weights_only=True) for r in (resumed, quickstart))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    ours, theirs = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert f"Tokens {'':<15}│ {STEPS * BATCH * 128:,}" in re.sub(r"Tokens +│", f"Tokens {'':<15}│", resumed.output)
