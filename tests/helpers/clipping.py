"""Gradients to clip, on one device."""

import torch
from torch import Tensor, nn

BOUND = {"norm": "max_norm", "value": "clip_value"}


def layer_with(*grads: Tensor | None) -> nn.ParameterList:
    """A module of parameters with these gradients; None: a matrix without one."""
    parameters = nn.ParameterList(torch.zeros(2, 2) if g is None else torch.zeros_like(g) for g in grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    return parameters


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((33, 7), (5,), (3, 4, 2))]


def bits(grads: list[Tensor]) -> list[Tensor]:
    return [grad.view(torch.int32) for grad in grads]
