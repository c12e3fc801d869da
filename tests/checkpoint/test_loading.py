"""What load_state_dict does on one device: hooks, names, copies, layouts in memory, and modules built on meta."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lightning_namo import NAMO, AdaMuon, build_optimizer
from tests.helpers.checkpointed import Chain
from tests.helpers.optimizers import OPTIMIZERS, all_optimizers
from tests.helpers.toy import assert_same


class ConvNet(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.table = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x)).mean(dim=(2, 3)) + self.table.weight.sum(0)
        return self.out(hidden)


def build(model: nn.Module, cls: Any = NAMO, **options: Any) -> torch.optim.Optimizer:
    """Of the convolution AdamW takes care."""
    exact = {"orthogonalizer": "svd"} if cls in OPTIMIZERS else {}
    return build_optimizer(model, cls, adamw="conv.weight", **{"lr": 0.05, **exact, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()


def trained(cls: Any = NAMO, steps: int = 3, **options: Any) -> tuple[ConvNet, torch.optim.Optimizer]:
    model = ConvNet()
    optimizer = build(model, cls, **options)
    train(model, optimizer, range(steps))
    return model, optimizer


# --- layouts in memory -----------------------------------------------------------------------------


@all_optimizers
@pytest.mark.parametrize("adopt", [False, True], ids=["own", "warm_start_states"])
def test_a_contiguous_checkpoint_resumes_in_a_channels_last_model(cls, adopt):
    model, optimizer = trained(torch.optim.AdamW if adopt else cls)
    saved = copy.deepcopy(optimizer.state_dict())
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        resumed_model = copy.deepcopy(model).to(memory_format=memory_format)
        resumed = build(resumed_model, cls, adopt_state=adopt)
        if adopt:
            with pytest.warns(UserWarning, match="goes on from another optimizer's"):
                resumed.load_state_dict(saved)
        else:
            resumed.load_state_dict(saved)
        for parameter, state in resumed.state.items():
            assert all(
                value.stride() == parameter.stride()
                for value in state.values()
                if value.shape == parameter.shape and value.dim() > 1
            )
        train(resumed_model, resumed, range(3, 7))
        runs.append(resumed_model.state_dict())
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)


def test_a_resumed_adamw_state_equals_torchs_over_the_next_steps():
    """AdamW alone has gradients: torch's own optimizer, resumed beside it, ends at the same weights."""
    model = ConvNet()
    theirs = torch.optim.AdamW(model.conv.parameters(), lr=0.05, weight_decay=0.1)
    twin = ConvNet()
    groups = [{"params": [twin.out.weight]}, {"params": list(twin.conv.parameters()), "orthogonalize": False}]
    hyper = {"adamw_lr": 0.05, "adamw_weight_decay": 0.1, "adamw_betas": (0.9, 0.999), "adamw_eps": 1e-8}
    ours = NAMO(groups, **hyper)

    def gradients(steps: range) -> None:
        for step in steps:
            for index, (a, b) in enumerate(zip(model.conv.parameters(), twin.conv.parameters(), strict=True)):
                grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + index))
                a.grad, b.grad = grad, grad.clone()
            theirs.step()
            ours.step()

    gradients(range(3))
    saved = copy.deepcopy((theirs.state_dict(), ours.state_dict()))
    twin.conv.to(memory_format=torch.channels_last)
    theirs = torch.optim.AdamW(model.conv.parameters(), lr=0.05, weight_decay=0.1)
    ours = NAMO(groups, **hyper)
    theirs.load_state_dict(saved[0])
    ours.load_state_dict(saved[1])
    gradients(range(3, 7))
    torch.testing.assert_close(twin.conv.state_dict(), model.conv.state_dict(), rtol=1e-5, atol=1e-6)


@all_optimizers
def test_a_loaded_state_is_a_copy(cls):
    model, optimizer = trained(cls)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    resumed_model = copy.deepcopy(model)
    resumed = build(resumed_model, cls)
    resumed.load_state_dict(state_dict)
    train(resumed_model, resumed, range(3, 5))
    for group in resumed.param_groups:
        group["lr"] = 9.0
    assert_same(state_dict["state"], kept["state"])
    assert state_dict["param_groups"] == kept["param_groups"]


# --- groups ----------------------------------------------------------------------------------------


@all_optimizers
def test_parameters_keep_their_names_where_the_checkpoint_has_another_order(cls):
    model, other = Chain("abc"), Chain("cab")
    optimizer, resumed = (build_optimizer(m, cls, lr=0.01, heads="matrix") for m in (model, other))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    resumed.load_state_dict(optimizer.state_dict())
    of_parameter = {p: name for name, p in other.named_parameters()}
    for group in resumed.param_groups:
        assert group["param_names"] == [of_parameter[p] for p in group["params"]]
    last = build_optimizer(model, cls, lr=0.01, heads="matrix")
    last.load_state_dict(resumed.state_dict())  # through two files
    assert_same(last.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_learning_rate_that_is_a_tensor_is_loaded_as_a_copy():
    rate = torch.tensor(0.25)
    model, optimizer = trained(lr=0.05)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = rate
    resumed = build(model)
    resumed.load_state_dict(saved)
    for group in resumed.param_groups:
        assert isinstance(group["lr"], Tensor)
        assert group["lr"] is not rate
        group["lr"].fill_(0.5)
    assert rate == 0.25


def test_steps_that_are_numbers_are_loaded_as_tensors():
    """torch.distributed.checkpoint and old versions of torch have them."""
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    resumed = build(copy.deepcopy(model))
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    saved["state"][0]["step"] = "three"
    with pytest.raises(ValueError, match=r"Expected the state of .*step three.*Nothing was loaded"):
        resumed.load_state_dict(saved)


# --- hooks -----------------------------------------------------------------------------------------


@all_optimizers
def test_hooks_run_as_torchs_do(cls):
    """A hook gets what the user gave (a shallow copy), once, before anything is read; the last ones see the result."""
    logs = []
    for kind in (cls, torch.optim.AdamW):
        model, optimizer = trained(kind)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed, log = build(copy.deepcopy(model), kind), []

        def before(hooked, state_dict, saved=saved, resumed=resumed, log=log):
            log.append(("first", hooked is resumed, state_dict is not saved, state_dict["state"] is saved["state"]))
            log.append(
                [group["params"] for group in state_dict["param_groups"]]
                == [group["params"] for group in saved["param_groups"]]
            )
            state_dict["param_groups"] = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]

        def replacing(hooked, state_dict, log=log):
            log.append(("second", {group["lr"] for group in state_dict["param_groups"]}))
            return {**state_dict, "param_groups": [{**g, "weight_decay": 0.5} for g in state_dict["param_groups"]]}

        def after(hooked, resumed=resumed, log=log):
            log.append(("after", {(group["lr"], group["weight_decay"]) for group in hooked.param_groups}))
            log.append(all(state["step"].dtype == torch.float32 for state in hooked.state.values()))
            log.append(sum(float(state["step"]) for state in hooked.state.values()))

        resumed.register_load_state_dict_pre_hook(before)
        resumed.register_load_state_dict_pre_hook(replacing)
        resumed.register_load_state_dict_post_hook(after)
        resumed.load_state_dict(saved)
        logs.append(log)
        assert_same(resumed.state_dict()["state"], saved["state"])
        assert {group["lr"] for group in saved["param_groups"]} != {0.125}  # the user's own is as it was
    assert logs[0] == logs[1]


def test_a_pre_hook_can_make_a_checkpoint_fit():
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [f"student.{name}" for name in group["param_names"]]
    resumed = build(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"it lacks .* and it has student"):
        resumed.load_state_dict(saved)

    def rename(_, state_dict):
        groups = [
            {**group, "param_names": [name.removeprefix("student.") for name in group["param_names"]]}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    resumed.register_load_state_dict_pre_hook(rename)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_post_hooks_do_not_run_after_a_refusal():
    called = []
    resumed = build(ConvNet())
    resumed.register_load_state_dict_post_hook(lambda _: called.append(True))
    with pytest.raises(ValueError, match="Nothing was loaded"):
        resumed.load_state_dict({"state": {}, "param_groups": []})
    assert not called


def test_a_post_hook_sees_statistics_in_their_own_dtypes():
    model, optimizer = ConvNet().bfloat16(), None
    optimizer = build(model, AdaMuon, momentum_dtype="float32")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    resumed = build(copy.deepcopy(model), AdaMuon, momentum_dtype="float32")
    resumed.register_load_state_dict_post_hook(lambda hooked: seen.append(copy.deepcopy(hooked.state_dict()["state"])))
    resumed.load_state_dict(saved)
    assert_same(seen, [saved["state"]])


# --- modules on the meta device --------------------------------------------------------------------


def test_a_state_for_parameters_without_memory_is_refused_by_name():
    _, optimizer = trained()
    with torch.device("meta"):
        empty = ConvNet()
    resumed = build(empty)
    with pytest.raises(ValueError, match=r"of conv.bias|conv.weight|table.weight|out.weight"):
        resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"on the meta device\. Give the module memory first.*Nothing was loaded"):
        resumed.load_state_dict(optimizer.state_dict())


@all_optimizers
def test_a_state_loads_after_a_module_built_on_meta_was_given_memory_in_place(cls):
    model, optimizer = trained(cls)
    with torch.device("meta"):
        empty = ConvNet()
    resumed = build(empty, cls)
    for parameter, source in zip(empty.parameters(), model.parameters(), strict=True):
        torch.utils.swap_tensors(parameter, nn.Parameter(source.detach().clone()))
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(empty, resumed, range(3, 6))
    assert_same(empty.state_dict(), model.state_dict())


def test_a_frozen_parameter_that_torchs_checkpoints_leave_out_is_refused_with_what_to_do():
    model, optimizer = trained()
    model.out.weight.requires_grad_(False)  # of the optimizer, which keeps its momentum
    weights, state = get_state_dict(model, optimizer)
    with pytest.raises(
        ValueError, match=r"out\.weight .* frozen, and torch.*requires_grad=True while you save and load"
    ):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    model.out.weight.requires_grad_(True)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights, state = get_state_dict(model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert_same(optimizer.state_dict()["state"], before)
