"""Gradient clipping on real processes: the norm, the clipped gradients and the trained weights are one device's."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_namo import NAMOD, ClipsGradients, GradientClipping, clip_gradients, gradient_norm, optimize_with
from lightning_namo.testing.layouts import LAYOUTS, Odd, gathered_weights, new_module, prescribed_gradients, whole
from tests.helpers import toy
from tests.helpers.clipping import BOUND
from tests.helpers.launch import run_ranks
from tests.helpers.strategies import EXACT_HYPER, STRATEGIES, Regression, RegressionNet
from tests.helpers.worker import Backward, Wire, clean, counted, relative_error

OF_DEVICES = [  # tests on four devices are slow
    pytest.param(name, marks=pytest.mark.slow) if devices > 2 else name for name, (devices, *_) in STRATEGIES.items()
]


WORLD_SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


# --- the functions, under every layout of the step's own tests ------------------------------------


def _fsdp1_hybrid(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    cpu = torch.device("cpu")
    strategy = ShardingStrategy.HYBRID_SHARD
    return FSDP(module, use_orig_params=True, device_id=cpu, sharding_strategy=strategy, device_mesh=mesh)


CLIP_LAYOUTS: dict[str, tuple[type[Odd], Callable[[nn.Module], nn.Module]]] = {
    **LAYOUTS,
    "fsdp1-hybrid": (Odd, _fsdp1_hybrid),
}


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    context: Any = contextlib.nullcontext()
    if isinstance(module, FSDP):
        context = FSDP.summon_full_params(module, writeback=False, with_grads=True)
    with context:
        return {clean(n): whole(p.grad).clone() for n, p in module.named_parameters() if p.grad is not None}


def clip_case(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Clip prescribed gradients by norm and by value; errors are relative to torch's clipping of the whole."""
    kind, wrap = CLIP_LAYOUTS[name]
    plain = new_module(kind, dtype)
    grads = prescribed_gradients(plain, 0)
    backward = Backward(module := wrap(plain), [grads])
    answer: dict[str, Any] = {}
    for algorithm, bound in (("norm", 0.5), ("value", 0.05)):
        module.zero_grad()
        backward(0)
        expected = {f"{child}.layer.{key}": g.clone() for child, of in grads.items() for key, g in of.items()}
        norm = torch.cat([grad.double().flatten() for grad in expected.values()]).norm()
        holders = [nn.Parameter(grad) for grad in expected.values()]
        for holder, grad in zip(holders, expected.values(), strict=True):
            holder.grad = grad
        if algorithm == "norm":
            torch.nn.utils.clip_grads_with_norm_(holders, bound, norm)
        else:
            torch.nn.utils.clip_grad_value_(holders, bound)
        with counted(wire := Wire()):
            found = clip_gradients(module, **{BOUND[algorithm]: bound})
        clipped = whole_gradients(module)
        assert clipped.keys() == expected.keys()
        errors = [relative_error(found, norm), *(relative_error(clipped[key], expected[key]) for key in expected)]
        answer[algorithm] = {"error": max(errors), "norm": found.item(), "calls": wire.calls}
    return answer


def clip_poisoned(name: str, factor: float | None) -> tuple[float, float]:
    """The norm before and after clipping where this rank's gradients are multiplied, or missing (None)."""
    kind, wrap = CLIP_LAYOUTS[name]
    plain = new_module(kind, torch.float64)
    grads = prescribed_gradients(plain, 0)
    module = wrap(plain)
    module(grads).backward()
    for parameter in module.parameters():
        if factor is None:
            parameter.grad = None
        elif parameter.grad is not None:
            parameter.grad *= factor
    return clip_gradients(module, max_norm=0.5).item(), gradient_norm(module).item()


def clip_flat_parameter() -> float:
    """FSDP1 with use_orig_params=False: the optimizer's parameters are runs over several parameters."""
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    flat = FSDP(copy.deepcopy(plain), use_orig_params=False, device_id=torch.device("cpu"))
    for module in (plain, flat):
        module(x).square().sum().backward()
    norms = [(clip_gradients(module, max_norm=0.5), gradient_norm(module)) for module in (plain, flat)]
    return max(relative_error(found, expected) for expected, found in zip(*norms, strict=True))


def clip_partial_sums() -> dict[str, float]:
    """A norm layer under sequence parallelism: its gradients are sums that are still to be made."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = {}
    for algorithm, bound in (("norm", 0.5), ("value", 0.2)):
        plain = nn.Sequential(nn.LayerNorm(6)).double()
        plain(x).pow(3).sum().backward()
        module = parallelize_module(nn.Sequential(nn.LayerNorm(6)).double(), mesh, {"0": SequenceParallel()})
        module(x.chunk(mesh.size(), dim=1)[mesh.get_rank()]).pow(3).sum().backward()
        assert isinstance(module[0].weight.grad, DTensor)
        assert module[0].weight.grad.placements[0].is_partial(), "else this test shows nothing"
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        clip_gradients(plain, **{BOUND[algorithm]: bound})
        norm = clip_gradients(module, **{BOUND[algorithm]: bound})
        pairs = zip(module.parameters(), plain.parameters(), strict=True)
        errors[algorithm] = max(
            [relative_error(norm, expected), *(relative_error(whole(p.grad), q.grad) for p, q in pairs)]
        )
    return errors


# --- Lightning's strategies, through the mixin and the callback -----------------------------------


class WithSGD(RegressionNet):
    """Weights that are sums of gradients, so that clipping shows in full."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5, foreach=False)


class WithNAMOD(RegressionNet):
    configure_optimizers = optimize_with(NAMOD, **EXACT_HYPER)


class Clipped(ClipsGradients, WithSGD):
    pass


class Norms(pl.Callback):
    """What was logged, step by step."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append(trainer.callback_metrics.get("grad_norm", torch.tensor(torch.nan)).item())


class TorchNorms(Norms):
    """The norms by torch, which can do it on one device."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.logged.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    def on_train_batch_end(self, *_: Any) -> None:
        pass


CLIP = {"norm": 0.1, "value": 0.02}
WAYS = {"mixin": Clipped, "callback": WithNAMOD}
Answer = tuple[dict[str, Tensor], list[float]]


def fit(module: RegressionNet, norms: Norms, strategy: Any, devices: int, shares: int, **options: Any) -> Answer:
    """Train 6 steps of 2 accumulated batches of 4 samples in all, divided over ``shares`` data-parallel ranks."""
    trainer = toy.trainer(
        norms,
        *options.pop("callbacks", []),
        devices=devices,
        strategy=strategy,
        max_steps=6,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        **options,
    )
    rank = dist.get_rank() // (devices // shares) if devices > 1 else 0
    order = [i for i in range(48) if i % shares == rank]  # of each batch of 4, every shares-th sample
    trainer.fit(module, DataLoader(Regression(), batch_size=4 // shares, sampler=order))
    return gathered_weights(trainer.strategy.model), norms.logged


def clipping(way: str, algorithm: str) -> dict[str, Any]:
    """The Trainer's options for a way of ours."""
    if way == "callback":
        return {"callbacks": [GradientClipping(**{BOUND[algorithm]: CLIP[algorithm]})]}
    return {"gradient_clip_val": CLIP[algorithm], "gradient_clip_algorithm": algorithm}


@functools.cache
def one_device(way: str, algorithm: str | None) -> Answer:
    """Lightning's own clipping on one device."""
    module = WithSGD() if way == "mixin" else WithNAMOD()
    return fit(module, TorchNorms(), "auto", 1, 1, **(clipping("mixin", algorithm) if algorithm else {}))


# --- one launch for each number of processes ------------------------------------------------------


def work(rank: int, world_size: int) -> dict[Any, Any]:
    os.environ.update(NODE_RANK="0")
    answers: dict[Any, Any] = {"flat": clip_flat_parameter(), "partial": clip_partial_sums()}
    for dtype in (torch.float64, torch.bfloat16):
        for name in CLIP_LAYOUTS:
            answers[name, dtype] = clip_case(name, dtype)
    for name in ("fsdp1", "fsdp2-uneven"):
        answers[name, "none"] = clip_poisoned(name, None)
        answers[name, "none on rank 1"] = clip_poisoned(name, None if rank == 1 else 1.0)
        answers[name, "nan on rank 1"] = clip_poisoned(name, torch.nan if rank == 1 else 1.0)
    for name, (devices, strategy, shard) in STRATEGIES.items():
        if devices == world_size:
            shares = 1 if name == "tp" else 2 if name == "fsdp2+tp" else devices
            for way, module in WAYS.items():
                for algorithm in CLIP:
                    options = clipping(way, algorithm)
                    answers[name, way, algorithm] = fit(module(shard), Norms(), strategy(), devices, shares, **options)
    return answers


@functools.cache
def answers(world_size: int) -> list[dict[Any, Any]]:
    return run_ranks(work, world_size, world_size, timeout=280)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
@pytest.mark.parametrize("algorithm", BOUND)
def test_a_layout_clips_as_one_process_does(layout: str, dtype: torch.dtype, world_size: int, algorithm: str) -> None:
    of_ranks = [answer[layout, dtype][algorithm] for answer in answers(world_size)]
    assert max(answer["error"] for answer in of_ranks) <= (1e-12 if dtype == torch.float64 else 1e-6)
    assert len({answer["norm"].hex() for answer in of_ranks}) == 1, "all ranks clip by the same number"
    for answer in of_ranks:
        assert answer["calls"] == ([] if layout == "ddp" else ["all_reduce"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2-uneven"])
def test_ranks_without_gradients_take_part_in_the_norm(layout: str, world_size: int) -> None:
    for answer in answers(world_size):
        assert answer[layout, "none"] == (0.0, 0.0)
        norm, after = answer[layout, "none on rank 1"]
        assert 0.5 < norm < answer[layout, torch.float64]["norm"]["norm"]
        assert after == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2-uneven"])
def test_a_nan_on_one_rank_reaches_all_of_them(layout: str, world_size: int) -> None:
    for answer in answers(world_size):
        assert all(math.isnan(norm) for norm in answer[layout, "nan on rank 1"])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_flat_parameters_are_clipped_too(world_size: int) -> None:
    assert max(answer["flat"] for answer in answers(world_size)) <= 1e-12


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_partial_sums_are_summed_before_they_are_measured(world_size: int) -> None:
    assert max(error for answer in answers(world_size) for error in answer["partial"].values()) <= 1e-12


@pytest.mark.parametrize("algorithm", CLIP)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", OF_DEVICES)
def test_a_strategy_trains_and_logs_as_one_device_with_clipping(strategy: str, way: str, algorithm: str) -> None:
    expected, norms = one_device(way, algorithm)
    tolerance = 1e-6 if strategy == "fsdp1" else 1e-9  # Lightning's FSDP precision makes float32 of the weights
    for answer in answers(STRATEGIES[strategy][0]):
        trained, logged = answer[strategy, way, algorithm]
        assert trained.keys() == expected.keys()
        assert max(relative_error(trained[name], expected[name]) for name in expected) <= tolerance
        torch.testing.assert_close(logged, norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("algorithm", CLIP)
@pytest.mark.parametrize("way", WAYS)
def test_the_runs_are_other_ones_without_clipping(way: str, algorithm: str) -> None:
    (unclipped, _), (clipped, norms) = one_device(way, None), one_device(way, algorithm)
    assert min(norms) > CLIP["norm"], "every step clips"
    assert min(relative_error(unclipped[name], clipped[name]) for name in clipped) > 1e-4
