"""The state of a parameter: what fits, and what is refused in words."""

import pytest
import torch

from lightning_namo import NAMOD
from tests.helpers.checkpointed import Model, build_exact
from tests.helpers.optimizers import through_a_file


@pytest.mark.parametrize("key", ["v", "momentum_buffer", "step"])
def test_an_incomplete_state_is_refused(key):
    optimizer = build_exact(Model(), NAMOD)
    saved = through_a_file(optimizer.state_dict())
    [(group, position)] = [
        (g, g["param_names"].index("qkv.weight")) for g in saved["param_groups"] if "qkv.weight" in g["param_names"]
    ]
    del saved["state"][group["params"][position]][key]
    with pytest.raises(ValueError, match=r"Expected the state of qkv.weight to be .* incomplete.*Nothing was loaded"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="the checkpoint has none"):
        optimizer.load_state_dict({**saved, "state": {}})


def test_a_v_of_another_length_is_refused_where_nothing_cut_it():
    optimizer = build_exact(Model(), NAMOD)
    saved = through_a_file(optimizer.state_dict())
    state, *_ = [state for state in saved["state"].values() if state.get("v", torch.zeros(())).shape == (4,)]
    state["v"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"v \(4,\) but the checkpoint has .*v \(3,\)"):
        optimizer.load_state_dict(saved)
