"""State dicts on one device: round trips, what is refused, and going on from another optimizer's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lightning_namo import NAMO, NAMOD, Muon, build_optimizer
from tests.helpers.checkpointed import Chain, Model, assert_same_state, build_exact, other_model, step, trained
from tests.helpers.optimizers import EXACT, OPTIMIZERS, all_optimizers, through_a_file
from tests.helpers.rules import taken
from tests.helpers.toy import assert_same

names = ("embed.weight", "qkv.weight", "qkv.bias", "conv.weight", "out.weight", "out.bias")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cls=st.sampled_from(OPTIMIZERS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    momentum=st.floats(0.0, 0.97),
    weight_decay=st.floats(0.0, 0.5),
    nesterov=st.booleans(),
    missing=st.lists(st.sets(st.sampled_from(names)), min_size=4, max_size=4),
    saved_at=st.integers(0, 4),
    by_module=st.booleans(),
)
def test_a_round_trip_changes_nothing(
    cls, rows, columns, dtype, momentum, weight_decay, nesterov, missing, saved_at, by_module
):
    hyper = taken(cls, {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
    model = Model(rows, columns).to(dtype)
    optimizer = build_exact(model, cls, **hyper)
    for seed, names in enumerate(missing[:saved_at]):
        step(optimizer, model, seed, tuple(names))
    if by_module:
        optimizer.consolidate_state_dict()
    saved = through_a_file(optimizer.state_dict())
    resumed_model = copy.deepcopy(model)
    resumed = build_exact(resumed_model, cls, lr=0.5, adamw_lr=0.25)  # the checkpoint's hyper-parameters win
    resumed.load_state_dict(saved)
    assert_same(resumed, optimizer)
    statistics = torch.promote_types(dtype, torch.float32)
    matrices = [state for state in resumed.state.values() if "skipped" in state]
    assert all(state[key].dtype == statistics for state in matrices for key in ("step", "v", "skipped") if key in state)
    for seed, names in enumerate(missing, start=10):
        step(optimizer, model, seed, tuple(names))
        step(resumed, resumed_model, seed, tuple(names))
    assert_same(resumed_model, model)
    assert_same(resumed, optimizer)


@all_optimizers
def test_names_decide_not_the_order(cls):
    """The module's layers were put in another order since; parameters of one shape would change places."""

    model, other = Chain("abc"), Chain("cab")
    other.load_state_dict(model.state_dict())
    optimizer, resumed = (build_optimizer(m, cls, heads="matrix", **EXACT) for m in (model, other))
    for seed, (m, o) in enumerate([(model, optimizer)] * 2):
        step(o, m, seed)
    resumed.load_state_dict(optimizer.state_dict())
    kept = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if p.dim() > 1}
    for name, parameter in other.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(resumed.state[parameter]["momentum_buffer"], kept[name])


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "another algorithm": (
        lambda: build_exact(Model(), NAMO).state_dict(),
        r"a checkpoint of NAMOD, but it has algorithm='NAMO'",
    ),
    "AdamW": (
        lambda: trained(torch.optim.AdamW, Model()).state_dict(),
        r"state of qkv.weight to be momentum_buffer \(12, 5\).* has exp_avg \(12, 5\)",
    ),
    "another model": (lambda: build_exact(other_model(), NAMOD).state_dict(), r"it has head.weight, head.bias besides"),
    "other parameters frozen": (
        lambda: build_exact(Model(frozen=False), NAMOD).state_dict(),
        r"it has frozen.weight, frozen.bias besides",
    ),
    "another shape": (
        lambda: build_exact(Model(rows=3), NAMOD).state_dict(),
        r"state of qkv.weight to be momentum_buffer \(12, 5\).*has momentum_buffer \(9, 5\)",
    ),
    "another routing": (
        lambda: build_exact(Model(), NAMOD, adamw="out.weight").state_dict(),
        r"out.weight is in 'adamw' with 7 parameters there, and in 'matrices' with 1 here",
    ),
    "other blocks": (
        lambda: build_optimizer(Model(), NAMOD, blocks={"qkv.weight": [4, 8]}).state_dict(),
        r"with blocks=3 in group 'matrices_blocks_3', but it has blocks=\[4, 8\]",
    ),
    "no state dict of an optimizer": (lambda: Model().state_dict(), r"with 'state' and 'param_groups', but got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_words_and_nothing_is_changed(case):
    make, message = REFUSED[case]
    model = Model()
    optimizer = build_exact(model, NAMOD)
    step(optimizer, model, 0)
    before = through_a_file(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was loaded"):
        optimizer.load_state_dict(make())
    assert_same_state(optimizer.state_dict(), before)


ORDERS = ("pre", "none", "post")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("own", ORDERS)
@pytest.mark.parametrize("saved", ORDERS)
def test_torch_distributed_checkpoint_loads_no_momentum_of_another_unit(saved, own, flat, tmp_path):
    """It reads the keys that the optimizer has which loads: what states mean must be in one of them."""

    def made(order):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        return model, build_optimizer(model, Muon, order=order, lr=0.1)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made(saved)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    dcp.save({"optimizer": get_state_dict(model, optimizer, options=options)[1]}, checkpoint_id=tmp_path)
    model, other = made(own)
    weights, state = get_state_dict(model, other, options=options)

    def load():
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
        set_state_dict(model, other, model_state_dict=weights, optim_state_dict=state, options=options)

    if saved == own:
        load()
        theirs = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert_same(other.state[other.param_groups[0]["params"][0]], theirs)
    else:
        with pytest.raises((ValueError, CheckpointException), match="order"):
            load()
