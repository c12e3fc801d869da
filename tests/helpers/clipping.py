"""Gradients to clip, on one device."""

import torch
from torch import Tensor

BOUND = {"norm": "max_norm", "value": "clip_value"}


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((33, 7), (5,), (3, 4, 2))]


def bits(grads: list[Tensor]) -> list[Tensor]:
    return [grad.view(torch.int32) for grad in grads]
