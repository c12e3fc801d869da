"""All ranks decide alike; what one rank cannot do ends the job with its message."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_namo import NAMO, NAMOD, AdaMuon, build_optimizer
from lightning_namo.testing.layouts import (
    LAYOUTS,
    Odd,
    gathered_weights,
    new_module,
    prescribed_gradients,
    shard_children,
    whole,
)
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.worker import clean, local

LEFT_ALONE, OTHER = "tall.layer.weight", "wide.layer.weight"


def _no_gradient(parameter: nn.Parameter, rank: int) -> None:
    parameter.grad = None


def _no_gradient_on_one_rank(parameter: nn.Parameter, rank: int) -> None:
    if rank == 1:
        parameter.grad = None


def _nan_on_rank(where: int, parameter: nn.Parameter, rank: int) -> None:
    if rank == where:
        local(parameter.grad).view(-1)[0] = torch.nan


def _none_on_rank_and_nan_on_the_other(where: int, parameter: nn.Parameter, rank: int) -> None:
    _nan_on_rank(1 - where, parameter, rank)
    if rank == where:
        parameter.grad = None


def _infinite_everywhere(parameter: nn.Parameter, rank: int) -> None:
    local(parameter.grad).fill_(torch.inf)


SPOILED = {  # how a gradient is spoiled: (by what, is it counted)
    "no-gradient": (_no_gradient, 0),
    "no-gradient-on-one-rank": (_no_gradient_on_one_rank, 1),
    "nan-on-rank-0": (functools.partial(_nan_on_rank, 0), 1),  # of replicas one counts in the sums, not the other
    "nan-on-rank-1": (functools.partial(_nan_on_rank, 1), 1),
    "none-on-rank-0-nan-on-rank-1": (functools.partial(_none_on_rank_and_nan_on_the_other, 0), 1),
    "none-on-rank-1-nan-on-rank-0": (functools.partial(_none_on_rank_and_nan_on_the_other, 1), 1),
    "infinite": (_infinite_everywhere, 1),
}


def spoil_one_step(rank: int, layout: str) -> dict[Any, Any]:
    answers = {}
    kind, wrap = LAYOUTS[layout]
    for spoiled, (spoil, _) in SPOILED.items():
        for cls in (NAMO, NAMOD, AdaMuon):
            module = wrap(new_module(kind, torch.float32))
            optimizer = build_optimizer(module, cls, blocks=kind.blocks, lr=0.05)
            named = {clean(name): parameter for name, parameter in module.named_parameters()}
            grads = [prescribed_gradients(new_module(kind, torch.float32), step) for step in range(2)]
            module(grads[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            module(grads[1]).backward()
            spoil(named[LEFT_ALONE], rank)
            before = {name: local(parameter.detach()).clone() for name, parameter in named.items()}
            state = {k: local(v).clone() for k, v in optimizer.state[named[LEFT_ALONE]].items()}
            optimizer.step()
            after = optimizer.state[named[LEFT_ALONE]]
            answers[spoiled, cls.__name__] = {
                "weight": torch.equal(before[LEFT_ALONE], local(named[LEFT_ALONE].detach())),
                "state": all(torch.equal(state[k], local(after[k])) for k in state if k != "skipped"),
                "skipped": int(after["skipped"] - state["skipped"]),
                "others": not torch.equal(whole(named[OTHER]), grads[0]["wide"]["weight"])
                and (before[OTHER].numel() == 0 or not torch.equal(before[OTHER], local(named[OTHER].detach()))),
            }
    return answers


@functools.cache
def spoiled_answers(layout: str) -> list[dict[Any, Any]]:
    return run_ranks(spoil_one_step, 2, layout, timeout=200)


@pytest.mark.parametrize("cls", ["NAMO", "NAMOD", "AdaMuon"])
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize(
    "layout", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp1")), "fsdp2-uneven"]
)
def test_a_spoiled_gradient_leaves_its_matrix_alone_on_all_ranks_and_no_other(
    layout: str, spoiled: str, cls: str
) -> None:
    for answer in spoiled_answers(layout):
        case = answer[spoiled, cls]
        assert case["weight"]
        assert case["state"]
        assert case["skipped"] == SPOILED[spoiled][1]
        assert case["others"]


def poison_adamw(rank: int) -> tuple[bool, bool]:
    module = new_module(Odd, torch.float32)
    LAYOUTS["fsdp2-uneven"][1](module)
    optimizer = build_optimizer(module, NAMO, lr=0.05)
    module(prescribed_gradients(new_module(Odd, torch.float32), 0)).backward()
    bias, weight = module.tall.layer.bias, module.tall.layer.weight
    if rank == 1:
        local(bias.grad)[0] = torch.nan
    before = local(bias.detach()).clone(), local(weight.detach()).clone()
    optimizer.step()
    return torch.equal(before[0], local(bias.detach())), torch.equal(before[1], local(weight.detach()))


def test_an_adamw_gradient_not_finite_on_one_rank_stops_adamw_on_all_ranks_and_no_matrix() -> None:
    assert run_ranks(poison_adamw, 2) == [(True, False), (True, False)]


def spoil_a_bias(rank: int, layout: str) -> tuple[Tensor, float, int, bool]:
    """Two steps, one without the gradient of a bias on one rank: the bias, its steps, what was left out, what moved."""
    module = LAYOUTS[layout][1](new_module(Odd, torch.float32))
    optimizer = build_optimizer(module, NAMO, lr=0.05)
    named = {clean(name): parameter for name, parameter in module.named_parameters()}
    bias, weight, moved = named["tall.layer.bias"], named["tall.layer.weight"], []
    for step in range(2):
        module(prescribed_gradients(new_module(Odd, torch.float32), step)).backward()
        if rank == 1 and step == 1:
            bias.grad = None
        before = local(weight.detach()).clone()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, local(weight.detach())))
    return whole(bias), optimizer.state[bias]["step"].item(), optimizer.skipped_steps(), all(moved)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2-uneven"])
def test_an_adamw_gradient_on_one_rank_only_leaves_adamw_alone_on_all_ranks_and_is_counted(layout: str) -> None:
    (first, *counts), (second, *others) = run_ranks(spoil_a_bias, 2, layout)
    assert torch.equal(first, second)
    assert counts == others == [1.0, 1, True]


def bounded_differently(rank: int) -> None:
    optimizer = NAMO([nn.Parameter(torch.ones(4, 4))])
    optimizer.bucket_bytes = 1000 + rank
    optimizer.sharing()


def test_another_bound_on_one_rank_is_refused_on_all() -> None:
    with pytest.raises(WorkerError, match=r"Expected the same bucket_bytes on all ranks but got \[1000, 1001\]"):
        run_ranks(bounded_differently, 2)


def differing_parameters(rank: int, extra: nn.Module) -> None:
    layers = [nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False)] + [extra] * rank
    module = nn.Sequential(*layers)
    optimizer = build_optimizer(module, NAMO, heads="matrix")
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("extra", "difference"),
    [
        (
            nn.Linear(6, 6, bias=False),
            r"rank 0 has 2 and rank 1 has 3: only rank 1 has 2\.weight of Sequential \(6, 6\)",
        ),
        (nn.LayerNorm(6, bias=False), r"rank 0 has 0 and rank 1 has 1: only rank 1 has 2\.weight of Sequential \(6,\)"),
    ],
    ids=["matrix", "adamw"],
)
def test_a_parameter_set_that_differs_between_ranks_is_named_at_the_first_step(
    extra: nn.Module, difference: str
) -> None:
    with pytest.raises(WorkerError, match=rf"(?s)hanging ranks \[\].*{difference}"):
        run_ranks(differing_parameters, 2, extra, timeout=60)


def different_weights(rank: int) -> None:
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False))
    optimizer = build_optimizer(module, NAMO)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_models_that_are_no_replicas_of_each_other_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"Expected ranks 0 and 1 to hold replicas of 0\.weight"):
        run_ranks(different_weights, 2, timeout=60)


def failing_rank(rank: int) -> None:
    module = DistributedDataParallel(new_module(Odd, torch.float32))
    optimizer = build_optimizer(module, NAMO)
    for step in range(3):
        module(prescribed_gradients(new_module(Odd, torch.float32), step)).backward()
        if rank == 1 and step == 1:
            weight = next(p for p in module.parameters() if p.dim() == 2)
            weight.grad = weight.grad.to_sparse()
        optimizer.step()


def crash(rank: int) -> None:
    if rank:
        os.abort()
    torch.distributed.barrier()


def test_a_crash_outside_python_on_one_rank_tells_where() -> None:
    with pytest.raises(WorkerError, match=r"(?s)exit codes \[1, -6\].*rank 1: Fatal Python error: Aborted.*in crash"):
        run_ranks(crash, 2)


def test_a_failure_on_one_rank_ends_the_job_with_its_message() -> None:
    with pytest.raises(WorkerError, match=r"(?s)hanging ranks \[\].*Expected a dense gradient"):
        run_ranks(failing_rank, 2, timeout=100)


def built_before_sharding(rank: int) -> None:
    module = new_module(Odd, torch.float32)
    optimizer = build_optimizer(module, NAMO)
    shard_children(module)
    module(prescribed_gradients(new_module(Odd, torch.float32), 0)).backward()
    optimizer.step()


def test_an_optimizer_built_before_sharding_is_refused() -> None:
    with pytest.raises(WorkerError, match="the module was sharded or replaced after the optimizer was built"):
        run_ranks(built_before_sharding, 2, timeout=60)


def sharded_over_a_third_dimension(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    module = nn.Conv2d(4, 4, 2)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(2)]))
    build_optimizer(module, NAMO)


def test_a_placement_that_cannot_be_served_is_named() -> None:
    with pytest.raises(
        WorkerError, match=r"Expected weight of Conv2d \(4, 4, 2, 2\) to be replicated or sharded over dimension"
    ):
        run_ranks(sharded_over_a_third_dimension, 2, timeout=60)


def gathered_after_a_step(rank: int) -> bool:
    """More ranks than matrices, one of which owns nothing."""
    module = nn.Linear(5, 3)
    torch.manual_seed(0)
    module = fully_shard(nn.Sequential(module))
    optimizer = build_optimizer(module, NAMO)
    before = whole(next(module.parameters())).clone()
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return not torch.equal(before, gathered_weights(module)["0.weight"])


def test_more_ranks_than_matrices_work() -> None:
    assert run_ranks(gathered_after_a_step, 4) == [True] * 4
