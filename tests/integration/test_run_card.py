"""The card of a run, read back from where the checkpoints are."""

import re
from functools import partial

import pytest
import torch

from lightning_namo import NAMO, OptimizerCallback
from lightning_namo.integration.run_card import RunCard
from tests.helpers import toy


@pytest.mark.parametrize("optimizer", [NAMO, torch.optim.AdamW])
def test_a_run_leaves_a_card_beside_its_checkpoints(tmp_path, optimizer):
    saver = toy.checkpoints(tmp_path / "checkpoints", every_n_train_steps=3)
    callback = OptimizerCallback(partial(optimizer, lr=0.01), adamw="head.weight")
    toy.fit(toy.Net(), callback, RunCard(), saver, enable_checkpointing=True, accumulate_grad_batches=2)
    card = (tmp_path / "checkpoints/run_card.md").read_text()
    assert f"- torch: {torch.__version__}" in card
    assert "- processes: 1 on 1 nodes" in card
    assert "- micro-batches accumulated: 2" in card
    assert re.search(r"- git commit: (none|[0-9a-f]{40})", card)
    assert f"## {optimizer.__name__}" in card
    assert re.search(r"head\.weight +3 x 10 +adamw +sure +glob 'head\.weight' in adamw", card)
    assert ("rank 0: 2 matrices" in card) == (optimizer is NAMO)


def test_without_checkpoints_the_card_is_in_the_default_folder(tmp_path):
    toy.fit(toy.Net(), OptimizerCallback(), RunCard(), default_root_dir=tmp_path, max_epochs=1)
    assert "1.000 of the mean" in (tmp_path / "run_card.md").read_text()
