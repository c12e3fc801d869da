"""`split_parameters` over a zoo of modules: what holds for all of them, under every strategy, and the table."""

import io
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, ZOO, ViT, frozen_backbone, keys_of, reasons_of, shared


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_every_parameter_is_assigned_exactly_once(build: Callable[[], nn.Module]) -> None:
    module = build()
    groups = split_parameters(module)
    parameters = list(module.parameters())
    assigned = [p for group in groups for _, p in group["params"]]
    assert len(assigned) == len(set(assigned))
    assert set(assigned) == {p for p in parameters if p.requires_grad}
    assert list(groups.templates) == list(groups.names) == parameters
    assert groups.regions.keys() == set(parameters)
    assert [route.name for route in groups.routes] == list(groups.names.values())
    assert [route.shape for route in groups.routes] == [tuple(p.shape) for p in parameters]
    assert len({route.name for route in groups.routes}) == len(parameters)
    assert all(route.reason for route in groups.routes)
    assert groups.module() is module


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_groups_agree_with_routes_and_templates(build: Callable[[], nn.Module]) -> None:
    module = build()
    groups = split_parameters(module)
    routes = {route.name: route for route in groups.routes}
    order = {parameter: position for position, parameter in enumerate(module.parameters())}
    assert len({group["name"] for group in groups}) == len(groups)
    assert [group["orthogonalize"] for group in groups] == sorted(g["orthogonalize"] for g in groups)[::-1]
    for group in groups:
        assert group["params"]
        positions = [order[p] for _, p in group["params"]]
        assert positions == sorted(positions)
        for name, parameter in group["params"]:
            assert groups.names[parameter] == name
            assert groups.templates[parameter] == keys_of(group)
            assert routes[name].group == group["name"]
            assert not group["orthogonalize"] or parameter.ndim >= 2
    assert all((routes[groups.names[p]].group == "frozen") == (not p.requires_grad) for p in module.parameters())


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_group_keys_survive_a_weights_only_checkpoint(build: Callable[[], nn.Module]) -> None:
    keys = [keys_of(group) for group in split_parameters(build())]
    file = io.BytesIO()
    torch.save(keys, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == keys


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_groups_are_taken_by_a_torch_optimizer_with_their_names(build: Callable[[], nn.Module]) -> None:
    groups = split_parameters(build())
    names = [[name for name, _ in group["params"]] for group in groups]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == names


def test_frozen_parameters_are_in_no_group_but_have_templates_to_be_unfrozen_by() -> None:
    model = frozen_backbone()
    groups = split_parameters(model, blocks={"*.qkv.weight": 3})
    trained = [[name for name, _ in group["params"]] for group in groups]
    assert trained == [["hidden.weight"], ["hidden.bias", "head.weight", "head.bias"]]
    backbone = model["backbone"]
    assert groups.templates[backbone.wte.weight] == {"name": "adamw", "orthogonalize": False}
    assert groups.templates[backbone.blocks[0].qkv.weight] == {
        "name": "matrices_blocks_3",
        "orthogonalize": True,
        "transposed": False,
        "blocks": 3,
    }
    reasons = reasons_of(groups)
    assert reasons["backbone.wte.weight"] == ("requires_grad=False; else embedding, tied to backbone.lm_head.weight")
    backbone.requires_grad_(True)
    unfrozen = split_parameters(model, blocks={"*.qkv.weight": 3})
    assert unfrozen.templates == groups.templates


def test_shared_submodules_appear_once_and_name_the_others() -> None:
    reasons = reasons_of(split_parameters(shared()))
    assert list(reasons) == ["first.weight", "first.bias", "middle.weight", "middle.bias"]
    assert reasons["first.weight"] == "matrix, tied to second.weight and 1 more"


@pytest.mark.usefixtures("fake_world")
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_routes_are_the_same_under_every_strategy(strategy: str, head: str) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(GPT(head), nn.Conv1d(3, 5, 3), nn.ConvTranspose1d(3, 5, 3))

    module, expected = build(), split_parameters(build())
    if strategy == "ddp":
        sharded = split_parameters(nn.parallel.DistributedDataParallel(module))
    elif strategy == "fsdp1":
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        module[0] = FullyShardedDataParallel(module[0], **options)
        module = FullyShardedDataParallel(module, **options)
        assert all(p.ndim == 1 for p in module.parameters())
        sharded = split_parameters(module)
    else:
        for part in (module[0].blocks[0].qkv, module[0], module):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        sharded = split_parameters(module)
    assert sharded.routes == expected.routes
    assert [keys_of(group) for group in sharded] == [keys_of(group) for group in expected]


def test_a_module_without_a_matrix_is_refused_with_what_there_is() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="trainable matrix") as error:
        split_parameters(model)
    assert str(error.value) == (
        "Expected a trainable matrix to orthogonalize in Sequential. Got 2 norm, 1 embedding. Use AdamW: "
        "build_optimizer has nothing to orthogonalize. Or name matrices with orthogonalize=('glob', ...)."
    )
    with pytest.raises(ValueError, match=r"Got no trainable parameter\."):
        split_parameters(nn.ReLU())
    with pytest.raises(ValueError, match=r"Got no trainable parameter, 2 frozen\."):
        split_parameters(nn.Linear(3, 3).requires_grad_(False))


def test_a_lazy_module_asks_for_a_dummy_forward() -> None:
    with pytest.raises(ValueError, match=r"1.weight to be initialized: .*dummy forward"):
        split_parameters(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)))


def test_the_table_has_a_line_per_parameter_and_counts() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 2, bias=False))
    model[2].requires_grad_(False)
    last = "output head, the last Linear, which nothing follows"
    assert str(split_parameters(model)) == "\n".join(
        [
            "name      shape  group     confidence  reason",
            "0.weight  5 x 4  adamw     sure        embedding",
            "1.weight  6 x 4  matrices  sure        matrix",
            "1.bias    6      adamw     sure        bias",
            f"2.weight  2 x 6  frozen    sure        requires_grad=False; else {last}",
            "4 parameters: 1 matrices (24 elements), 2 AdamW (26 elements), 1 frozen (12 elements)",
        ]
    )


def test_parameters_of_which_nothing_is_known_are_named_at_the_end_of_the_table() -> None:
    model = ViT()
    model.mystery = nn.Parameter(torch.zeros(3, 4))
    groups = split_parameters(model)
    table = str(groups).splitlines()
    row = next(line for line in table if line.startswith("mystery"))
    assert row.endswith("  matrices  please check  matrix, a bare parameter whose name says nothing")
    assert table[-1] == "Please check 2 of them: mix, mystery."
    assert json.loads(groups.to_json())[0] == {
        "name": "cls_token",
        "shape": [1, 1, 8],
        "group": "adamw",
        "confidence": "sure",
        "reason": "token",
    }
    named = split_parameters(model, orthogonalize=["mix", "mystery"])
    assert [route.confidence for route in named.routes if route.name in ("mix", "mystery")] == ["sure", "sure"]
    assert "Please check" not in str(named)


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_the_counts_of_the_table_cover_all_elements(build: Callable[[], nn.Module]) -> None:
    module = build()
    lines = str(split_parameters(module)).splitlines()
    place = next(place for place, line in enumerate(lines) if " parameters: " in line)
    numbers = [int(word.strip("(").replace(",", "")) for word in lines[place].split() if word.strip("(")[0].isdigit()]
    assert numbers[0] == numbers[1] + numbers[3] + numbers[5] == place - 1
    assert numbers[2] + numbers[4] + numbers[6] == sum(math.prod(p.shape) for p in module.parameters())
