"""The ids of parameters in state dicts."""

from tests.helpers.checkpointed import Model, build_exact
from tests.helpers.optimizers import all_optimizers
from tests.helpers.toy import assert_same


@all_optimizers
def test_ids_are_positions_in_the_module_where_lightning_saves_and_by_groups_elsewhere(cls):
    model = Model()
    optimizer = build_exact(model, cls)
    by_groups = optimizer.state_dict()
    optimizer.consolidate_state_dict()
    by_module = optimizer.state_dict()
    positions = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    for group in by_module["param_groups"]:
        assert group["params"] == [positions[name] for name in group["param_names"]]
    assert [i for g in by_groups["param_groups"] for i in g["params"]] == list(range(len(by_groups["state"])))
    assert_same(optimizer.state_dict()["state"], by_groups["state"])  # asked for once
