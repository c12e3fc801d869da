"""What differs between the releases of torch that the package runs on: nothing else in it asks for a version."""

from __future__ import annotations

import torch


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices.

    Before `torch.cpu.get_capabilities` only those of x86 are known: an Arm CPU counts as one without.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())
