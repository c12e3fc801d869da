"""An output head that is trained while all matrices are frozen: the ranks agree although no matrix is exchanged."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_namo import NAMO, build_optimizer
from lightning_namo.testing.layouts import gathered_weights
from tests.helpers.launch import run_ranks

STEPS, SKIPPED = 4, 1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)]
    for layer in layers[:-1]:
        layer.requires_grad_(False)
    return nn.Sequential(*layers)


def trained(net: nn.Sequential, rank: int) -> tuple[dict[str, torch.Tensor], int, list[str]]:
    """Head alone, with a NaN on one rank in one step; from the middle on with what was frozen."""
    optimizer = build_optimizer(net, NAMO, lr=0.1, orthogonalizer="svd")
    for step in range(STEPS):
        if step == STEPS // 2:
            frozen = [parameter for layer in list(net)[:-1] for parameter in layer.parameters()]
            for parameter in frozen:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": frozen})
        net(torch.linspace(-1, 1, 12).view(3, 4) * (step + 1)).square().mean().backward()
        if step == SKIPPED and rank == 0:
            grad = net[-1].weight.grad
            getattr(grad, "_local_tensor", grad).fill_(torch.nan)
        optimizer.step()
        optimizer.zero_grad()
    return gathered_weights(net), optimizer.skipped_steps(), [group["name"] for group in optimizer.param_groups]


def sharded(rank: int) -> tuple[dict[str, torch.Tensor], int, list[str]]:
    return trained(fully_shard(model()), rank)


def test_a_head_trained_alone_trains_as_on_one_process_and_so_do_the_matrices_that_follow() -> None:
    weights, skipped, names = trained(model(), 0)
    assert (skipped, names) == (1, ["adamw", "adamw_2", "matrices"])
    for of_rank in run_ranks(sharded, 2, timeout=60):
        assert of_rank[1:] == (skipped, names)
        for name, weight in weights.items():
            torch.testing.assert_close(of_rank[0][name], weight, rtol=1e-5, atol=1e-6)


def by_accelerate(rank: int) -> dict[str, torch.Tensor]:
    import os

    from accelerate import Accelerator

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 3))
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(net)
    assert isinstance(prepared, nn.parallel.DistributedDataParallel)
    optimizer = accelerator.prepare(build_optimizer(prepared, NAMO, lr=0.1, orthogonalizer="svd"))
    for step in range(2):
        x = torch.linspace(-1, 1, 24).view(6, 4)[3 * rank : 3 * rank + 3] * (step + 1)
        accelerator.backward(prepared(x).square().mean())
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def test_accelerate_with_ddp_trains_as_one_process_does() -> None:
    """The page on other frameworks says so."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 3))
    optimizer = build_optimizer(net, NAMO, lr=0.1, orthogonalizer="svd")
    for step in range(2):
        net(torch.linspace(-1, 1, 24).view(6, 4) * (step + 1)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for of_rank in run_ranks(by_accelerate, 2, timeout=100):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(of_rank[name], parameter.detach(), rtol=1e-5, atol=1e-6)
