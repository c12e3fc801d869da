"""What the ranks publish, as far as one process shows it; tests/distributed/test_parted.py compares real ranks."""

from __future__ import annotations

import torch

from lightning_namo.sharding.agreement import ParameterDescription
from lightning_namo.sharding.publication import Replicas


def test_weights_of_replicas_add_up_to_zero_over_the_ranks() -> None:
    regions = ("top", "bottom", "top", "top", None)
    parts = [ParameterDescription("w", (4, 4), torch.float32, region, 0) for region in regions]
    replicas = [Replicas.of(rank, parts) for rank in range(4)]
    assert replicas == [Replicas(3, -2), Replicas(3, 0), Replicas(3, 1), Replicas(3, 1)]
