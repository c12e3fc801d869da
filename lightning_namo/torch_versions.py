"""What differs between the releases of torch that the package runs on: nothing else in it asks for a version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices.

    Before `torch.cpu.get_capabilities` (torch 2.12) only those of x86 are known: an Arm CPU counts as one without.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())


def eagerly(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.compiler.disable` for a method, also where it is compiled by itself: ``torch.compile(optimizer.step)``."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        disabled: Callable[..., Any] = torch.compiler.disable(method, reason=reason)  # type: ignore[no-untyped-call]
        if not hasattr(disabled, "_torchdynamo_wrapper_id"):  # torch 2.10 takes the method from here, without its self
            vars(disabled).pop("_torchdynamo_orig_callable", None)
        return disabled

    return decorate
