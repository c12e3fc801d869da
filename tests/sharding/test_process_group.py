"""The default process group, on one process: there is none."""

from __future__ import annotations

import pytest
import torch

from lightning_namo.sharding.process_group import collective, current_group, initialized, leave, mean_over_ranks


def test_without_a_group_a_mean_is_the_tensor_and_there_is_nothing_to_leave() -> None:
    assert not initialized()
    assert current_group() is None
    assert torch.equal(mean_over_ranks(tensor := torch.ones(2)), tensor)
    leave()


@pytest.mark.usefixtures("fake_world")
def test_a_program_leaves_its_group() -> None:
    assert current_group() is torch.distributed.group.WORLD
    leave()
    assert not initialized()
    torch.distributed.init_process_group("fake", rank=0, world_size=1)  # for the fixture to leave


def test_an_error_at_a_meeting_says_what_to_look_for() -> None:
    message = r"to meet to exchange matrices, but some did not come: timed out Look for a rank"
    with pytest.raises(RuntimeError, match=message), collective("exchange matrices"):
        raise RuntimeError("timed out")
    with pytest.raises(KeyError), collective("exchange matrices"):
        raise KeyError("another error is not the others' absence")
