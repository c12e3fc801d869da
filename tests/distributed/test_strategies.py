"""Lightning's strategies, on real processes: the one line and the callback train as on one device."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_namo import NAMO, NAMOD, OptimizerCallback, WarmupStableDecay, build_optimizer, optimize_with
from lightning_namo.testing.layouts import gathered_weights, whole
from tests.helpers import toy
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.strategies import EXACT_HYPER, STRATEGIES, Regression, RegressionNet, fsdp2
from tests.helpers.worker import relative_error

SCHEDULE = WarmupStableDecay(warmup=2, decay=2, total_steps=6)


class WithTheLine(RegressionNet):
    """The same with the one line in its body."""

    configure_optimizers = optimize_with(NAMOD, schedule=SCHEDULE, **EXACT_HYPER)


CLIPPED = ("ddp", "fsdp2")  # where Lightning itself clips by norm


def fit(
    strategy: str | Strategy, devices: int, shares: int, shard: Any, callback: bool, clip: bool
) -> dict[str, Tensor]:
    """Train 6 steps of 2 accumulated batches of 4 samples in all, divided over ``shares`` data-parallel ranks."""
    module = RegressionNet(shard) if callback else WithTheLine(shard)
    callbacks = [OptimizerCallback(functools.partial(NAMOD, **EXACT_HYPER), schedule=SCHEDULE)] if callback else []
    trainer = toy.trainer(
        *callbacks,
        devices=devices,
        strategy=strategy,
        max_steps=6,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1 if clip else None,
        use_distributed_sampler=False,
    )
    data = Regression()
    if shares > 1:  # rank r of the data-parallel ranks takes every shares-th sample of each global batch
        tensor_parallel = devices // shares
        rank = dist.get_rank() // tensor_parallel
        order = [i for start in range(0, 48, 4) for i in range(start, start + 4) if i % shares == rank]
        trainer.fit(module, DataLoader(data, batch_size=4 // shares, sampler=order))
    else:
        trainer.fit(module, DataLoader(data, batch_size=4))
    return gathered_weights(trainer.strategy.model)


def fit_cases(rank: int, names: list[str]) -> dict[Any, dict[str, Tensor]]:
    os.environ.update(NODE_RANK="0")
    answers = {}
    for name in names:
        devices, strategy, shard = STRATEGIES[name]
        shares = 1 if name == "tp" else 2 if name == "fsdp2+tp" else devices
        for callback in (False, True):
            for clip in {False, name in CLIPPED}:
                answers[name, callback, clip] = fit(strategy(), devices, shares, shard, callback, clip)
    return answers


@functools.cache
def answers(devices: int) -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(
        fit_cases, devices, [n for n, (count, _, _) in STRATEGIES.items() if count == devices], timeout=280
    )


@functools.cache
def one_device(callback: bool, clip: bool) -> dict[str, Tensor]:
    return fit("auto", 1, 1, None, callback, clip)


CASES = [
    pytest.param(name, callback, clip, marks=[pytest.mark.slow] * (STRATEGIES[name][0] > 2))
    for name in STRATEGIES
    for callback in (False, True)
    for clip in sorted({False, name in CLIPPED})
]


@pytest.mark.parametrize(("strategy", "callback", "clip"), CASES)
def test_a_strategy_trains_as_one_device_does(strategy: str, callback: bool, clip: bool) -> None:
    expected = one_device(callback, clip)
    tolerance = 1e-6 if strategy == "fsdp1" else 1e-9  # Lightning's FSDP precision makes float32 of the weights
    for answer in answers(STRATEGIES[strategy][0]):
        trained = answer[strategy, callback, clip]
        assert trained.keys() == expected.keys()
        for name, weight in trained.items():
            assert relative_error(weight, expected[name]) <= tolerance, name


def fabric_fsdp2(rank: int, right_order: bool) -> bool:
    os.environ.update(NODE_RANK="0")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricModelParallelStrategy(parallelize_fn=fsdp2))
    fabric.launch()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))
    if right_order:
        model = fabric.setup_module(model)
        optimizer: Any = fabric.setup_optimizers(build_optimizer(model, NAMO, lr=0.05))
    else:
        model, optimizer = fabric.setup(model, build_optimizer(model, NAMO, lr=0.05))
    before = [whole(p).clone() for p in model.parameters()]
    fabric.backward(model(torch.ones(2, 6)).square().sum())
    optimizer.step()
    return all(not torch.equal(b, whole(p)) for b, p in zip(before, model.parameters(), strict=True))


def test_fabric_with_fsdp2_trains_in_the_order_that_the_documentation_gives() -> None:
    assert run_ranks(fabric_fsdp2, 2, True, timeout=90) == [True, True]


def test_the_fabric_order_that_trains_nothing_is_refused() -> None:
    with pytest.raises(WorkerError, match=r"training would change nothing.*then build the optimizer"):
        run_ranks(fabric_fsdp2, 2, False, timeout=90)
