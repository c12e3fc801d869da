"""The form of FSDP1's checkpoints: what the plain form becomes in it, and back."""

from __future__ import annotations

import pytest
import torch

from lightning_namo import NAMO, NAMOD
from lightning_namo.checkpoint.flat_form import fill_empty, flat_form, plain_form
from lightning_namo.sharding.layout import FlatRange
from tests.helpers.checkpointed import Model, build_exact, step
from tests.helpers.optimizers import all_optimizers
from tests.helpers.toy import assert_same


@all_optimizers
def test_a_state_in_the_flat_form_is_like_its_parameter_and_returns_as_it_was(cls: type) -> None:
    model = Model()
    optimizer = build_exact(model, cls)
    step(optimizer, model, 0)
    for parameter in optimizer._parameter_states():
        flat = flat_form(parameter, optimizer._kinds)
        assert flat["momentum_buffer"].shape == flat["exp_avg_sq"].shape == parameter.tensor.shape
        assert_same(plain_form(flat, parameter), dict(parameter.state))


@pytest.mark.parametrize(("start", "stop", "kept"), [(0, 2, 2), (2, 4, 2), (3, 9, 1)])
def test_a_v_that_fsdp1_cut_is_put_back_where_it_was(start: int, stop: int, kept: int) -> None:
    optimizer = build_exact(Model(), NAMOD)
    parameter = next(p for p in optimizer._parameter_states() if p.name == "out.weight")  # 5 x 4: v has four numbers
    parameter.region = FlatRange(start, stop, 4)
    cut = torch.arange(1.0, 1 + kept)
    expected = torch.zeros(4)
    expected[start : start + kept] = cut
    saved = {**parameter.state, "v": cut}
    assert_same(plain_form(saved, parameter)["v"], expected)


def test_parameters_of_which_this_rank_holds_nothing_get_an_empty_state() -> None:
    parameters = build_exact(Model(), NAMO)._parameter_states()
    parameters[0].region = FlatRange(0, 0, 4)
    fill_empty(states := [{} for _ in parameters], parameters)
    assert states[0].keys() == parameters[0].state.keys()
    assert states[1:] == [{}] * (len(parameters) - 1)
