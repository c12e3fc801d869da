"""A state dict loads under every layout of the parameters, whatever layout its tensors have, or is refused in words."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from lightning_namo import NAMO, NAMOD, AdaMuon, build_optimizer
from lightning_namo.testing.layouts import LAYOUTS, Even, gathered_weights, new_module, prescribed_gradients
from tests.helpers.launch import run_ranks
from tests.helpers.worker import local, relative_error

OPTIMIZERS: dict[str, Any] = {"NAMO": NAMO, "NAMOD": NAMOD, "AdaMuon": AdaMuon}
TARGETS = ["ddp", "fsdp1", "fsdp2-even", "fsdp2-shard1", "hsdp", "tp", "fsdp2+tp"]
SOURCES = ["plain", "fsdp1", "fsdp2-even", "fsdp2-shard1", "hsdp", "tp", "fsdp2+tp"]
ADOPTED = ["plain", "fsdp2-even", "fsdp2-shard1"]
SAVED_AT, STEPS = 2, 3


def wrapped(layout: str) -> nn.Module:
    module = new_module(Even, torch.float64)
    return module if layout == "plain" else LAYOUTS[layout][1](module)


def build(module: nn.Module, optimizer: str, **options: Any) -> torch.optim.Optimizer:
    if optimizer == "AdamW":
        return build_optimizer(module, torch.optim.AdamW, lr=0.05)
    return build_optimizer(module, OPTIMIZERS[optimizer], lr=0.05, orthogonalizer="svd", blocks=Even.blocks, **options)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    plain = new_module(Even, torch.float64)
    for step in steps:
        optimizer.zero_grad()
        module(prescribed_gradients(plain, step)).backward()
        optimizer.step()


def saved_state(layout: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As the optimizer gives it: DTensors under FSDP2 and TP; under FSDP1 as its users gather it."""
    if layout != "fsdp1":
        return copy.deepcopy(optimizer.state_dict())
    whole = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False)
    with warnings.catch_warnings(), FSDP.state_dict_type(module, StateDictType.FULL_STATE_DICT, *whole):
        warnings.simplefilter("ignore")
        return copy.deepcopy(FSDP.optim_state_dict(module, optimizer))


def like_parameters(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all state of a parameter's shape is a tensor of the parameter's kind, placements and local strides."""
    for parameter, state in optimizer.state.items():
        for key in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & state.keys() | ({"v"} & state.keys()):
            value = state[key]
            if key == "v" and not isinstance(optimizer, AdaMuon):
                continue
            same = isinstance(value, DTensor) == isinstance(parameter, DTensor) and value.shape == parameter.shape
            if isinstance(value, DTensor):
                same = same and value.placements == parameter.placements
            if not same or local(value).stride() != local(parameter).stride():
                return False
    return True


def go_on(
    target: str, optimizer: str, before: str, sources: dict[str, dict[str, Any]], **options: Any
) -> dict[str, tuple[dict[str, Tensor], bool] | str]:
    """For each state dict: the weights of a run whose optimizer is replaced by one that loads it, and how it lies."""
    module, answers = wrapped(target), {}
    train(module, build(module, before), range(SAVED_AT))
    weights = [local(parameter.detach()).clone() for parameter in module.parameters()]
    for source, state_dict in sources.items():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            local(parameter.detach()).copy_(weight)
        resumed = build(module, optimizer, **options)
        try:
            resumed.load_state_dict(state_dict)
            alike = like_parameters(resumed)
            train(module, resumed, range(SAVED_AT, STEPS))
            answers[source] = gathered_weights(module), alike
        except Exception as error:  # of one case: the others go on
            answers[source] = repr(error)
    return answers


def trained_states(optimizer: str, sources: list[str]) -> dict[str, dict[str, Any]]:
    states = {}
    for source in sources:
        module = wrapped(source)
        trained = build(module, optimizer)
        train(module, trained, range(SAVED_AT))
        states[source] = saved_state(source, module, trained)
    return states


def load_everywhere(rank: int) -> tuple[dict[Any, Any], dict[str, Any]]:
    answers: dict[Any, Any] = {}
    expected: dict[str, Any] = {}
    for optimizer in ("NAMOD", "AdaMuon"):
        module = wrapped("plain")
        train(module, build(module, optimizer), range(STEPS))
        expected[optimizer] = gathered_weights(module)
        states = trained_states(optimizer, SOURCES)
        answers |= {(target, optimizer): go_on(target, optimizer, optimizer, states) for target in TARGETS}
    return answers, expected


@functools.cache
def everywhere() -> list[Any]:
    return run_ranks(load_everywhere, 2, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["NAMOD", "AdaMuon"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_state_of_any_layout_loads_under_every_layout(source: str, target: str, optimizer: str) -> None:
    for answers, expected in everywhere():
        answer = answers[target, optimizer][source]
        assert not isinstance(answer, str), answer
        weights, alike = answer
        assert alike
        for name, weight in weights.items():
            assert relative_error(weight, expected[optimizer][name]) <= 1e-12, name


def adopt_everywhere(rank: int) -> dict[str, Any]:
    states = trained_states("AdamW", ADOPTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {target: go_on(target, "NAMO", "AdamW", states, adopt_state=True) for target in TARGETS}


@functools.cache
def adopted_everywhere() -> list[Any]:
    return run_ranks(adopt_everywhere, 2, timeout=240)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ADOPTED)
def test_a_state_of_adamw_of_any_layout_is_adopted_under_every_layout(source: str, target: str) -> None:
    for answers in adopted_everywhere():
        expected, answer = answers["ddp"]["plain"], answers[target][source]
        assert not isinstance(answer, str), answer
        assert answer[1]
        for name, weight in answer[0].items():
            assert relative_error(weight, expected[0][name]) <= 1e-12, name


# --- refusals --------------------------------------------------------------------------------------


def refuse(rank: int) -> dict[str, tuple[str, bool]]:
    """What is refused, in what words, and whether the optimizer was left as it was."""
    answers: dict[str, tuple[str, bool]] = {}

    def attempt(case: str, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        before = {p: {k: local(v).clone() for k, v in state.items()} for p, state in optimizer.state.items()}
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        try:
            optimizer.load_state_dict(state_dict)
            message = ""
        except ValueError as error:
            message = str(error)
        same = groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        same = same and all(
            torch.equal(value, local(optimizer.state[p][key]))
            for p, state in before.items()
            for key, value in state.items()
        )
        answers[case] = message, same

    module = wrapped("fsdp2-even")
    optimizer = build(module, "NAMOD")
    train(module, optimizer, range(1))
    plain_module = wrapped("plain")
    plain = build(plain_module, "NAMOD")
    train(plain_module, plain, range(2))

    state_dict = copy.deepcopy(plain.state_dict())
    last = max(state_dict["state"])  # the others would fit
    shaped = next(key for key in ("exp_avg", "momentum_buffer") if key in state_dict["state"][last])
    state_dict["state"][last][shaped] = torch.zeros(5)
    attempt("another shape", optimizer, state_dict)
    state_dict = copy.deepcopy(plain.state_dict())
    state_dict["state"][last][shaped] = copy.deepcopy(local(optimizer.state_dict()["state"][last][shaped]))
    attempt("a shard", optimizer, state_dict)
    fsdp1 = wrapped("fsdp1")
    raw = build(fsdp1, "NAMOD")
    train(fsdp1, raw, range(1))
    attempt("FSDP1's own shards", plain, copy.deepcopy(raw.state_dict()))
    return answers


@functools.cache
def refusals() -> list[Any]:
    return run_ranks(refuse, 2, timeout=100)


@pytest.mark.parametrize("case", ["another shape", "a shard", "FSDP1's own shards"])
def test_what_fits_no_layout_is_refused_in_words_on_all_ranks_and_nothing_is_changed(case: str) -> None:
    for answers in refusals():
        message, same = answers[case]
        assert "Expected the state of " in message
        assert "or one rank's shards" in message
        assert "Nothing was loaded" in message
        assert same


def sharded_state(rank: int) -> dict[str, Any]:
    module = wrapped("fsdp2-even")
    optimizer = build(module, "NAMO")
    train(module, optimizer, range(1))
    return copy.deepcopy(optimizer.state_dict())


def test_shards_of_processes_that_are_gone_are_refused_by_name() -> None:
    state_dict = run_ranks(sharded_state, 2)[0]  # pickled: DTensors without their process group
    module = wrapped("plain")
    optimizer = build(module, "NAMO")
    train(module, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"(?s)Expected to put together .* of .*weight.* full_state_dict.*Nothing was"):
        optimizer.load_state_dict(state_dict)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
