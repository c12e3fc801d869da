"""Symmetric products by blocks."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_namo import orthogonalize
from lightning_namo.polar.cost import newton_schulz_flops


def test_a_cpu_computes_five_eighths_of_symmetric_products():
    with FlopCounterMode(display=False) as counted:
        orthogonalize(torch.ones(768, 3072))
    assert counted.get_total_flops() == 2 * 768**3 * (2 * 4 + 5 / 8 * (2 * 4 + 14))
    assert newton_schulz_flops((768, 3072), 5) == 2 * 768**3 * (2 * 4 + (2 * 4 + 14))  # as accelerators do
