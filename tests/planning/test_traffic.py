"""Communication beside the work."""

from __future__ import annotations

from lightning_namo.planning.cost_model import overlapped


def test_communication_hides_behind_the_work_on_other_buckets() -> None:
    assert overlapped([1], [5], [1]) == 7  # nothing to hide behind
    # Buckets arrive and leave while others are worked on: what is left is the first way in and the last way back.
    assert overlapped([1, 1, 1], [5, 5, 5], [1, 1, 1]) == 17
    assert overlapped([4, 4, 4], [0, 0, 0], [4, 4, 4]) == 24  # nothing to hide it
