"""Two nodes on one machine: two agents of torchrun, which know of each other what nodes do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.job import AT, STEPS, losses, run_agents, succeed

# processes per node, options for the same global batch as in the uninterrupted run, relative tolerance of the losses:
# sharded training rounds otherwise. A resumed run repeats the bits.
RECIPES: dict[str, tuple[int, list[str], float]] = {
    "ddp": (1, [], 0.0),
    "fsdp2": (1, [], 1e-4),
    "hsdp": (2, ["--data.batch_size=2"], 1e-4),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", RECIPES)
def test_two_nodes_train_save_and_resume_as_one_does(
    strategy: str, folder: Path, uninterrupted: dict[int, float]
) -> None:
    devices, options, tolerance = RECIPES[strategy]
    succeed(run_agents(folder, *options, strategy=strategy, nodes=2, devices=devices))
    whole = losses(folder)
    assert len(whole) == STEPS
    assert whole == pytest.approx(uninterrupted, rel=tolerance, abs=0)
    checkpoint = f"--ckpt_path=saved/step={AT}.ckpt"
    succeed(run_agents(folder, *options, checkpoint, strategy=strategy, nodes=2, devices=devices))
    assert losses(folder, AT) == {step: loss for step, loss in whole.items() if step >= AT}
