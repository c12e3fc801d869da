"""What would part the ranks without a word is said, on all of them: weights, hyper-parameters, gradients, groups."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, build_optimizer
from lightning_namo.testing.layouts import shard_children
from tests.helpers.launch import WorkerError, run_ranks
from tests.helpers.worker import local

OPTIMIZERS = {cls.__name__: cls for cls in (NAMO, NAMOD, Muon, AdaMuon)}
HYPER: dict[str, Any] = {"lr": 0.02, "orthogonalizer": "svd"}
Wrap = Callable[[nn.Module], nn.Module]


def new_module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()  # norms and biases, too: none is its own mirror image
    return module


def plain(module: nn.Module) -> nn.Module:
    return module


def hsdp(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    return shard_children(module, mesh)


def set_gradients(module: nn.Module, seed: int = 0) -> None:
    """The same on all ranks that hold the same part."""
    for index, parameter in enumerate(module.parameters()):
        part = local(parameter.detach())
        shard = dist.get_rank() % 2 if isinstance(parameter, DTensor) else 0
        generator = torch.Generator().manual_seed(1000 * seed + 10 * index + shard)
        grad = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).copy_(grad)


def weights(module: nn.Module) -> list[Tensor]:
    return [local(parameter.detach()).clone() for parameter in module.parameters()]


def message(step: Callable[[], Any]) -> str:
    """What it raises, as its class and text; "" if it raises nothing."""
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stepped(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[str, bool]:
    """What a step raises, and whether the weights are as they were."""
    before = weights(module)
    said = message(optimizer.step)
    return said, all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def all_cases(rank: int) -> dict[str, Any]:
    """What needs two ranks and leaves them together: a launch costs more than the cases."""
    orders = {case: other_order(rank, *case) for case in ORDERS}
    return {
        "weights": spoil_weights(rank, plain),
        "gradients": feed_differently(rank, plain),
        "rounding": average_roughly(rank),
        "hyper": differ(rank),
        "deferred": without_waiting(rank),
        "sparse": sparse_on_one_rank(rank),
        "replaced": replaced_on_one_rank(rank),
        "orders": orders,
        "join": in_a_join(rank),
        "zero": in_zero(rank),
        "meta": on_the_meta_device(rank),
        "evaluated": evaluate_between(rank),
    }


def hsdp_cases(rank: int) -> dict[str, Any]:
    return {"weights": spoil_weights(rank, hsdp), "gradients": feed_differently(rank, hsdp)}


@functools.cache
def answers_of(layout: str) -> list[dict[str, Any]]:
    return run_ranks(all_cases, 2, timeout=280) if layout == "replicas" else run_ranks(hsdp_cases, 4, timeout=280)


def answers(case: str, layout: str = "replicas") -> list[Any]:
    """What the case gave on each rank."""
    return [answer[case] for answer in answers_of(layout)]


both_layouts = pytest.mark.parametrize("layout", ["replicas", pytest.param("hsdp", marks=pytest.mark.slow)])


# ---------------------------------------------------------------------- weights of replicas


def spoil_weights(rank: int, wrap: Wrap) -> dict[str, tuple[str, bool]]:
    """One parameter at a time has its rows, or elements, in the opposite order on the last rank."""
    answers = {}
    for spoiled in ("0.weight", "1.weight", "1.bias", "2.weight", "none"):
        module = wrap(new_module())
        if spoiled != "none" and rank == dist.get_world_size() - 1:
            with torch.no_grad():
                part = local(module.get_parameter(spoiled))
                part.copy_(part.flip(0))
        optimizer = build_optimizer(module, NAMO, **HYPER)
        set_gradients(module)
        answers[spoiled] = stepped(optimizer, module)
    return answers


@both_layouts
def test_replicas_of_every_parameter_are_compared_in_the_order_of_their_elements(layout: str) -> None:
    for cases in answers("weights", layout):
        assert cases["none"] == ("", False)
        for name, (said, unchanged) in cases.items() - {"none": ("", False)}.items():
            assert said.startswith("ValueError")
            assert f"to hold replicas of {name} of Sequential " in said
            assert unchanged


# ---------------------------------------------------------------------- gradients of replicas


def feed_differently(rank: int, wrap: Wrap) -> dict[Any, tuple[str, bool]]:
    """A gradient of another size on the last rank, in the second step."""
    answers: dict[Any, tuple[str, bool]] = {}
    for name, cls in OPTIMIZERS.items():
        for spoiled, factor in (("1.weight", 1.1), ("0.weight", 1.1), ("2.bias", 0.9), ("1.weight", 1 + 1e-6)):
            module = wrap(new_module())
            optimizer = build_optimizer(module, cls, **HYPER)
            for step in range(2):
                set_gradients(module, step)
                if step and rank == dist.get_world_size() - 1:
                    local(module.get_parameter(spoiled).grad).mul_(factor)
                answers[name, spoiled, factor] = stepped(optimizer, module)
    return answers


@both_layouts
def test_replicas_that_are_fed_different_gradients_are_refused_and_rounding_is_not(layout: str) -> None:
    for cases in answers("gradients", layout):
        for (_, spoiled, factor), (said, unchanged) in cases.items():
            if abs(factor - 1) < 1e-5:
                assert said == ""
                assert not unchanged
            else:
                assert said.startswith(
                    f"RuntimeError: Expected the replicas of {spoiled} of Sequential to have the same gradient"
                )
                assert unchanged


def average_roughly(rank: int) -> list[str]:
    """Gradients that each rank adds up in an order of its own; a plan after that; and equal ones of very long rows."""
    said = []
    wide = nn.Parameter(torch.ones(2, 100_000))
    optimizer = NAMOD([wide], lr=0.02, orthogonalizer="newton_schulz")
    wide.grad = torch.full_like(wide, 0.1)
    said.append(message(optimizer.step))
    module = new_module()
    optimizer = build_optimizer(module, NAMO, **HYPER)
    for step in range(3):
        set_gradients(module, step)
        for parameter in module.parameters():
            parameter.grad *= 1 + 3e-7 * rank
        said.append(message(optimizer.step))
        optimizer.load_state_dict(optimizer.state_dict())
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float32, 1e12), (torch.float64, 1.0)):
        module = new_module(dtype)
        optimizer = build_optimizer(module, NAMOD, lr=0.02)
        for step in range(3):
            for index, parameter in enumerate(module.parameters()):
                generator = torch.Generator().manual_seed(100 * step + index)
                parts = scale * torch.randn(8, *parameter.shape, generator=generator)
                parameter.grad = torch.zeros_like(parameter)
                for part in parts if rank == 0 else parts.flip(0):
                    parameter.grad += part.to(dtype)
            said.append(message(optimizer.step))
    return said


def test_gradients_that_were_reduced_in_another_order_are_no_different_ones() -> None:
    assert answers("rounding") == [[""] * 13] * 2


# ---------------------------------------------------------------------- hyper-parameters


def differ(rank: int) -> dict[str, tuple[str, bool]]:
    answers = {}
    start = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.2, "adamw_eps": 1e-6, "nesterov": False, "max_step": None}
    for key, value in start.items():
        module = new_module()
        optimizer = build_optimizer(module, NAMO, **HYPER | ({key: value} if rank else {}))
        set_gradients(module)
        answers[f"start {key}"] = stepped(optimizer, module)
    for key, value in (("lr", 0.01), ("momentum", 0.9), ("weight_decay", 0.0), ("tensor lr", 0.01)):
        module = new_module()
        optimizer = build_optimizer(module, NAMO, **HYPER)
        matrices = optimizer.param_groups[0]
        if key.startswith("tensor"):
            matrices["lr"] = torch.tensor(0.02)
        for step in range(3):
            set_gradients(module, step)
            if step == 2 and rank:  # as a schedule on a metric of this rank does
                if key.startswith("tensor"):
                    matrices["lr"].fill_(value)
                else:
                    matrices[key] = value
            answers[f"later {key}"] = stepped(optimizer, module)
            assert step == 2 or answers[f"later {key}"][0] == ""
    for key, value in (("lr", 1.9e-6), ("weight_decay", 0.4)):  # a small tensor beside a large one
        module = new_module()
        optimizer = build_optimizer(
            module, NAMO, **HYPER | {"lr": torch.tensor(1e-6), "weight_decay": torch.tensor(0.5)}
        )
        for step in range(2):
            set_gradients(module, step)
            if step and rank:
                optimizer.param_groups[0][key].fill_(value)
            answers[f"small {key}"] = stepped(optimizer, module)
    module = new_module()  # a last bit that two kinds of CPUs compute differently is no difference
    optimizer = build_optimizer(module, NAMO, **HYPER)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.017 * (1 + rank * step * 4e-16)
        set_gradients(module, step)
        answers["same"] = stepped(optimizer, module)
    return answers


def test_hyper_parameters_that_differ_between_ranks_are_refused_at_the_start_and_later() -> None:
    for cases in answers("hyper"):
        assert cases["same"] == ("", False)
        for case, (said, unchanged) in cases.items() - {"same": ("", False)}.items():
            key = case.split()[-1].removeprefix("adamw_")
            assert said.startswith(f"ValueError: Expected the same {key} of group "), case
            assert "rank 0 has" in said
            assert unchanged


def without_waiting(rank: int) -> list[list[str]]:
    """Flags are read in the next step, as where a device must not be waited for (there is none here)."""
    answers = []
    for what in ("gradient", "lr", "sparse"):
        module = new_module()
        optimizer = build_optimizer(module, NAMO, **HYPER)
        optimizer.sharing()  # plans
        optimizer._agreement.alarm.at_once = False
        said = []
        for step in range(3):
            set_gradients(module, step)
            weight = module.get_parameter("1.weight")
            if step == 1 and rank:
                if what == "gradient":
                    weight.grad *= 2
                elif what == "lr":
                    optimizer.param_groups[0]["lr"] *= 2
                else:
                    weight.grad = weight.grad.to_sparse()
            said.append(message(optimizer.step))
            if rank and "sparse" in said[-1]:
                break
        answers.append(said)
    return answers


def test_where_the_device_is_not_waited_for_the_next_step_says_what_parted_the_ranks() -> None:
    first, second = answers("deferred")
    for gradient, lr, _ in (first, second):
        assert gradient[:2] == lr[:2] == ["", ""]
        assert "Expected the replicas of 1.weight of Sequential to have the same gradient" in gradient[2]
        assert "Expected the same lr of group 'matrices'" in lr[2]
    assert first[2][:2] == ["", ""]
    assert "rank 1 refused its own" in first[2][2]
    assert second[2][0] == ""
    assert "Expected a dense gradient but 1.weight" in second[2][1]


# ---------------------------------------------------------------------- what one rank cannot do


def sparse_on_one_rank(rank: int) -> dict[str, tuple[str, bool]]:
    answers = {}
    for name in ("1.weight", "0.weight"):
        module = new_module()
        optimizer = build_optimizer(module, NAMO, **HYPER)
        for step in range(2):
            set_gradients(module, step)
            parameter = module.get_parameter(name)
            if step and rank:
                parameter.grad = parameter.grad.to_sparse()
            answers[name] = stepped(optimizer, module)
    return answers


def test_a_sparse_gradient_on_one_rank_ends_the_step_on_all_before_anything_moves() -> None:
    for cases in answers("sparse"):
        for name, (said, unchanged) in cases.items():
            assert f"Expected a dense gradient but {name} of Sequential has a torch.sparse_coo one" in said
            assert unchanged


def replaced_on_one_rank(rank: int) -> tuple[str, bool]:
    module: Any = new_module()
    optimizer = build_optimizer(module, NAMO, **HYPER)
    for step in range(2):
        if step and rank:
            module[3] = nn.Linear(8, 5)
        set_gradients(module, step)
        for parameter in list(module.parameters())[-2:] if rank and step else []:
            parameter.grad = None
        optimizer.zero_grad() if rank and step else None
        answer = stepped(optimizer, module)
    return answer


def test_a_layer_replaced_on_one_rank_ends_the_step_on_all() -> None:
    for said, unchanged in answers("replaced"):
        assert "3.weight of Sequential no longer is" in said
        assert unchanged


def other_order(rank: int, swapped: int, alike: bool, sharded: bool) -> list[str]:
    """Two optimizers, over models of one shape or of two, in turn; from a step on in another order on rank 1."""
    modules: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4 if alike else 4 + k, bias=False)) for k in range(2)]
    if sharded:
        modules = [fully_shard(module) for module in modules]
    pairs = [(module, build_optimizer(module, Muon, **HYPER)) for module in modules]
    said = []
    for step in range(2):
        for module, _ in pairs:
            set_gradients(module, step)
        for _, optimizer in reversed(pairs) if rank and step >= swapped else pairs:
            said.append(message(optimizer.step))
    return said


# (from which step on in another order, models of one shape, sharded)
ORDERS = [(0, True, False), (0, False, False), (1, True, False), (0, True, True), (0, False, True), (1, True, True)]


@pytest.mark.parametrize("case", ORDERS)
def test_another_order_of_two_optimizers_on_one_rank_is_refused_on_all(case: tuple[int, bool, bool]) -> None:
    swapped, alike, sharded = case
    for orders in answers("orders"):
        first, second, *_ = orders[case][2 * swapped :]
        # Shards of one shape and name tell nothing of the model that they are of; the second optimizer's turn does.
        found = second if alike and sharded and not swapped else first
        assert "order" in found
        assert "on all ranks" in found


def in_a_join(rank: int) -> str:
    module = DistributedDataParallel(nn.Linear(4, 4))
    optimizer = build_optimizer(module, NAMO, **HYPER)
    said = ""
    with module.join():
        for _ in range(1 + rank):
            module(torch.ones(1, 4)).square().sum().backward()
            said = said or message(optimizer.step)
    return said


def test_a_step_in_ddps_join_is_refused() -> None:
    for said in answers("join"):
        assert "Expected all ranks to take every step, but the model runs in DistributedDataParallel's join()" in said


def in_zero(rank: int) -> str:
    module = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    optimizer = ZeroRedundancyOptimizer(module.parameters(), NAMO, lr=0.02)
    set_gradients(module)
    return message(optimizer.step)


def test_the_zero_redundancy_optimizer_is_refused() -> None:
    for said in answers("zero"):
        assert "Expected the same parameters on all ranks" in said
        assert "ZeroRedundancyOptimizer" in said


def on_some_ranks(rank: int, planned: bool) -> None:
    """Rank 1 ends before the first step, as one without a model does, or before the second."""
    module = new_module()
    optimizer = build_optimizer(module, NAMO, **HYPER)
    set_gradients(module)
    if planned:
        optimizer.step()
    if rank == 1:
        os._exit(0)
    optimizer.step()


@pytest.mark.parametrize("planned", [False, True])
def test_a_rank_that_does_not_come_ends_the_others_with_what_to_look_for(planned: bool) -> None:
    purpose = "sum their statistics" if planned else "compare their parameters before a step"
    with pytest.raises(WorkerError, match=rf"Expected all ranks to meet to {purpose}.*Look for a rank that raised"):
        run_ranks(on_some_ranks, 2, planned, timeout=100)


def on_the_meta_device(rank: int) -> str:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4))
    optimizer = build_optimizer(module, NAMO)
    module.to_empty(device="cpu")
    set_gradients(module)
    return message(optimizer.step)


def test_an_optimizer_built_before_the_module_was_materialized_is_refused() -> None:
    assert "0.weight of Sequential no longer is" in on_the_meta_device(0)
    for said in answers("meta"):
        assert "or materialized from the meta device" in said


# ---------------------------------------------------------------------- a forward pass outside training


def evaluate_between(rank: int) -> tuple[list[str], float]:
    """After forward passes without gradients, which leave FSDP2's root whole: what is said, how far outputs are off."""
    torch.manual_seed(0)
    pairs: list[nn.Module] = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2)]
    pairs[1].load_state_dict(pairs[0].state_dict())
    fully_shard(pairs[0])
    x = torch.randn(3, 4)
    said, optimizers = [], []
    for model in pairs:
        with torch.no_grad():
            model(x)
        optimizers.append(build_optimizer(model, NAMO, **HYPER))
    for _ in range(2):
        for model, optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            with torch.no_grad():
                model(x)
            if model is pairs[0]:
                said += [message(optimizer.sharing), message(optimizer.step)]
            else:
                optimizer.step()
    with torch.no_grad():
        return said, (pairs[0](x) - pairs[1](x)).abs().max().item()


def test_fsdp2_may_run_forward_outside_training_before_a_step() -> None:
    for said, error in answers("evaluated"):
        assert said == [""] * 4
        assert error < 1e-5


# ---------------------------------------------------------------------- a new process group


def remake_the_group(rank: int, folder: Path) -> list[list[Tensor]]:
    """Weights after two steps on three ranks, two on two of them in the opposite order, and two alone."""
    module = new_module(torch.float64)
    optimizer = build_optimizer(module, NAMOD, **HYPER)
    found = []
    for stage, (place, ranks) in enumerate(((rank, 3), (1 - rank, 2), (0, 1))):
        if stage:
            dist.destroy_process_group()
            if place < 0 or (stage == 2 and rank):
                break
            group = f"file://{folder}/{stage}"
            dist.init_process_group("gloo", init_method=group, rank=place, world_size=ranks)
        for step in range(2):
            set_gradients(module, 10 * stage + step)
            optimizer.step()
        found.append(weights(module))
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder}/end-{rank}", rank=0, world_size=1)
    return found


def test_a_process_group_made_anew_is_planned_for_anew(tmp_path: Path) -> None:
    module = new_module(torch.float64)
    optimizer = build_optimizer(module, NAMOD, **HYPER)
    expected = []
    for stage in range(3):
        for step in range(2):
            set_gradients(module, 10 * stage + step)
            optimizer.step()
        expected.append(weights(module))
    of_ranks = run_ranks(remake_the_group, 3, tmp_path)
    assert [len(found) for found in of_ranks] == [3, 2, 1]
    for found in of_ranks:
        for stage, reference in zip(found, expected, strict=False):
            torch.testing.assert_close(stage, reference, rtol=1e-12, atol=1e-12)
