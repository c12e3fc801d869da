"""Batches of matrices, such as experts, are trained as a loop over plain matrices would train them."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, build_optimizer, split_parameters
from tests.helpers.optimizers import EXACT, all_optimizers, randn, through_a_file
from tests.helpers.toy import assert_same

E, M, N = 3, 5, 4


def experts(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(randn(E, M, N, dtype=dtype))


def gradient(step: int, like: Tensor) -> Tensor:
    return randn(*like.shape, seed=100 + step, dtype=like.dtype)


def loop(cls: type, whole: Tensor, *, transposed: bool, blocks: Any, **hyper: Any) -> tuple[list[nn.Parameter], Any]:
    """Each expert as a parameter of its own, with output features as rows."""
    turned = whole.detach().mT if transposed else whole.detach()
    parameters = [nn.Parameter(expert.clone()) for expert in turned]
    return parameters, cls([{"params": parameters, "blocks": blocks}], **hyper)


CASES = [
    {"transposed": False, "blocks": 1},
    {"transposed": True, "blocks": 1},
    {"transposed": True, "blocks": 2},
    {"transposed": False, "blocks": [2, 3]},
]


@all_optimizers
@pytest.mark.parametrize("batched", [None, True], ids=["cpu", "as on accelerators"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_are_trained_as_a_loop_trains_matrices(cls: Any, case: dict[str, Any], batched: bool | None) -> None:
    whole = experts()
    alone, by_loop = loop(cls, whole, **case, lr=0.1, **EXACT)
    together = cls([{"params": [whole], "batched": True, **case}], lr=0.1, **EXACT)
    together.batched = by_loop.batched = batched
    for step in range(3):
        whole.grad = gradient(step, whole)
        for p, grad in zip(alone, whole.grad.mT if case["transposed"] else whole.grad, strict=True):
            p.grad = grad.contiguous()
        together.step()
        by_loop.step()
    turned = whole.detach().mT if case["transposed"] else whole.detach()
    state = together.state[whole]
    for i, (p, expert) in enumerate(zip(alone, turned, strict=True)):
        torch.testing.assert_close(expert, p.detach(), rtol=1e-12, atol=1e-14)
        for key, kind in together._kinds.items():
            of_loop, of_batch = by_loop.state[p][key], state[key]
            if kind == "element":
                torch.testing.assert_close(of_batch.mT[i] if case["transposed"] else of_batch[i], of_loop)
            else:
                torch.testing.assert_close(of_batch.view(E, *of_loop.shape)[i], of_loop)
    assert state["step"] == 3
    assert state["step"].shape == ()


@all_optimizers
@pytest.mark.parametrize("batched", [None, True])
def test_an_expert_with_a_gradient_that_is_not_finite_skips_the_parameter(cls: Any, batched: bool | None) -> None:
    whole, other = experts(), nn.Parameter(randn(M, N, dtype=torch.float64))
    optimizer = cls([{"params": [whole], "batched": True}, {"params": [other]}], lr=0.1, **EXACT)
    optimizer.batched = batched
    for step in range(3):
        whole.grad, other.grad = gradient(step, whole), gradient(step, other)
        before = copy.deepcopy((whole.detach(), {k: v for k, v in optimizer.state[whole].items() if k != "skipped"}))
        if step == 1:
            whole.grad[1, 0, 0] = torch.nan
        optimizer.step()
        if step == 1:
            after = whole.detach(), {k: v for k, v in optimizer.state[whole].items() if k != "skipped"}
            assert_same(after, before)
    state = optimizer.state[whole]
    assert (state["step"], state["skipped"]) == (2, 1)
    assert optimizer.state[other]["step"] == 3


def test_an_expert_without_tokens_decays_and_its_momentum_fades() -> None:
    whole = experts()
    optimizer = NAMO([{"params": [whole], "batched": True}], lr=0.1, decay="lr", weight_decay=0.5, **EXACT)
    whole.grad = gradient(0, whole)
    optimizer.step()
    momentum, before = optimizer.state[whole]["momentum_buffer"].clone(), whole.detach().clone()
    whole.grad = gradient(1, whole)
    whole.grad[2] = 0.0
    optimizer.step()
    torch.testing.assert_close(optimizer.state[whole]["momentum_buffer"][2], 0.95 * momentum[2])
    assert not torch.equal(whole[2], before[2])


@all_optimizers
def test_a_checkpoint_goes_on_exactly(cls: Any) -> None:
    def run(optimizer: Any, steps: range) -> None:
        (whole,) = optimizer.param_groups[0]["params"]
        for step in steps:
            whole.grad = gradient(step, whole)
            optimizer.step()

    first = cls([{"params": [experts()], "batched": True, "blocks": [2, 3]}], **EXACT)
    run(first, range(2))
    (whole,) = first.param_groups[0]["params"]
    resumed = cls([{"params": [nn.Parameter(whole.detach().clone())], "batched": True, "blocks": [2, 3]}], **EXACT)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    for optimizer in (first, resumed, copied := copy.deepcopy(resumed)):
        run(optimizer, range(2, 4))
    for optimizer in (resumed, copied):
        assert_same(optimizer.param_groups[0]["params"], first.param_groups[0]["params"])
        assert_same(optimizer, first)


def test_a_checkpoint_of_one_flattened_matrix_is_refused() -> None:
    whole = experts()
    flat, batch = NAMOD([{"params": [whole]}]), NAMOD([{"params": [whole], "batched": True}])
    with pytest.raises(ValueError, match=r"Expected a checkpoint with batched=True .* but it has batched=False"):
        batch.load_state_dict(flat.state_dict())


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@all_optimizers
@pytest.mark.parametrize("batched", [None, True])
def test_kernels_and_calls_do_not_grow_with_the_number_of_experts(cls: Any, batched: bool | None) -> None:
    kernels, frames = [], []
    for count in (8, 256):
        whole = nn.Parameter(randn(count, 12, 8))
        optimizer = cls([{"params": [whole], "batched": True}])
        optimizer.batched = batched
        for _ in range(2):
            whole.grad = gradient(0, whole)
            with Calls() as calls:
                optimizer.step()
        kernels.append(calls.count)
        called = 0

        def count_call(frame: Any, event: str, argument: Any) -> None:
            nonlocal called
            called += event == "call" and "lightning_namo" in frame.f_code.co_filename

        whole.grad = gradient(0, whole)
        sys.setprofile(count_call)
        optimizer.step()
        sys.setprofile(None)
        frames.append(called)
    assert kernels[1] <= kernels[0] + 2
    assert frames[1] <= frames[0] + 2


@pytest.mark.parametrize("silent", [0, 1])
def test_a_warm_start_counts_as_a_first_step_of_the_whole_parameter(silent: int) -> None:
    """The step of all experts, also where one of them has had no tokens."""
    whole = experts()
    adamw = torch.optim.AdamW([{"params": [("w", whole)]}])
    whole.grad = gradient(0, whole)
    whole.grad[silent] = 0.0
    adamw.step()
    optimizer = NAMOD([{"params": [("w", whole)], "batched": True}], **EXACT)
    optimizer.adopt_state = True
    with pytest.warns(UserWarning, match="the momentum of 1 matrices"):
        optimizer.load_state_dict(adamw.state_dict())
    state = optimizer.state[whole]
    assert state["step"] == 1
    assert (state["v"].sum(dim=1) > 0).tolist() == [i != silent for i in range(E)]


def test_a_batch_that_is_not_contiguous_is_refused_by_name() -> None:
    weight = nn.Parameter(randn(3, 5, 4).permute(0, 2, 1))
    with pytest.raises(ValueError, match=r"parameter 0 \(3, 4, 5\), a batch of matrices, to be contiguous"):
        NAMO([{"params": [weight], "batched": True}])


# --- routing --------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, is_transposed: bool | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(E, M, N))
        self.bias = nn.Parameter(randn(E, M))
        if is_transposed is not None:
            self.is_transposed = is_transposed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.known, self.turned, self.unknown = Experts(False), Experts(True), Experts()
        self.grouped, self.depthwise = nn.Conv1d(6, 9, 2, groups=3), nn.Conv1d(4, 8, 3, groups=4)
        self.up = nn.ConvTranspose1d(6, 8, 2, groups=2)
        self.token = nn.Parameter(randn(1, 1, 7))


def test_batches_are_found_and_the_table_says_what_was_assumed() -> None:
    groups = split_parameters(Model(), adamw="*.bias", first_layers="matrix")
    routes = {route.name: route for route in groups.routes}
    assert routes["known.weight"].reason == "3 matrices 5 x 4, output features as rows, declared by Experts"
    assert routes["turned.weight"].reason == "3 matrices 5 x 4, input features as rows, declared by Experts"
    assert "assumed of a bare parameter: see batched, transposed, matrix" in routes["unknown.weight"].reason
    assert routes["grouped.weight"].reason.startswith("3 matrices 3 x 4, output features as rows, one for each group")
    assert routes["up.weight"].reason.startswith("2 matrices 3 x 8, input features as rows, one for each group")
    assert routes["depthwise.weight"].reason == "depthwise convolution"
    assert routes["token"].group == "adamw"
    names = {
        name: template["name"] for name, template in zip(groups.names.values(), groups.templates.values(), strict=True)
    }
    assert names["turned.weight"] == "matrices_batched_transposed"
    assert names["grouped.weight"] == "matrices_batched_3"


def test_the_user_says_what_is_a_batch_and_how_it_is_stored() -> None:
    model = Model()
    keys = {"adamw": "*.bias", "matrix": "known.weight", "transposed": "unknown.*ght", "blocks": {"turned.weight": 2}}
    keys["first_layers"] = "matrix"
    optimizer = build_optimizer(model, NAMO, **keys)
    group = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert "batched" not in group[model.known.weight]
    assert (group[model.unknown.weight]["batched"], group[model.unknown.weight]["transposed"]) == (True, True)
    assert group[model.turned.weight]["blocks"] == 2
    optimizer = build_optimizer(model, NAMO, adamw="*.bias", batched="grouped.weight", first_layers="matrix")
    group = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert group[model.grouped.weight]["batched"] is True
    with pytest.raises(ValueError, match=r"one glob to decide on known\.weight"):
        split_parameters(model, batched="known.weight", matrix="known.*")
    with pytest.raises(
        ValueError, match=r"three or more dimensions, a batch along the first, but known\.bias has shape"
    ):
        split_parameters(model, batched="known.bias")
    with pytest.raises(ValueError, match=r"'nothing' in transposed to match a parameter"):
        split_parameters(model, transposed="nothing")


def test_grouped_convolutions_are_trained_as_their_groups() -> None:
    model = Model()
    optimizer = build_optimizer(model, NAMOD, lr=0.1, first_layers="matrix", **EXACT)
    weights = {name: getattr(model, name).weight for name in ("grouped", "up")}
    parts = {
        name: [nn.Parameter(part.detach().flatten(1).clone()) for part in weight.chunk(3 if name == "grouped" else 2)]
        for name, weight in weights.items()
    }
    plain = NAMOD([{"params": parts["grouped"]}, {"params": parts["up"], "transposed": True}], lr=0.1, **EXACT)
    for step in range(2):
        for name, weight in weights.items():
            weight.grad = gradient(step, weight)
            for part, grad in zip(parts[name], weight.grad.chunk(len(parts[name])), strict=True):
                part.grad = grad.flatten(1).clone()
        optimizer.step()
        plain.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().flatten(1), torch.cat(parts[name]).detach())
