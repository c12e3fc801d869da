"""Tests of lightning_namo.param_groups over a zoo of modules."""

import io
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_namo.routing.reasons import Route
from lightning_namo.routing.split import ParameterGroups, split_parameters


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)


class GPT(nn.Module):
    """A small GPT; `head` is "tied", "untied" or None (the embedding's weight is used by F.linear)."""

    def __init__(self, head: str | None = "tied", vocabulary: int = 64, width: int = 8, positions: int = 16) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.ln_f = nn.LayerNorm(width, bias=False)
        if head is not None:
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if head == "tied":
            self.lm_head.weight = self.wte.weight


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=1, add_bias_kv=True)
        self.scale = LayerScale(8)
        self.mix = nn.Parameter(torch.zeros(8, 8))
        self.extra_embeds = nn.ParameterList([torch.zeros(4, 8)])
        self.head = nn.Linear(8, 10)


class RMSNormWithMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 8))


def cnn() -> nn.Module:
    return nn.ModuleDict(
        {
            "one": nn.Conv1d(4, 6, 3),
            "two": nn.Conv2d(4, 6, (3, 5)),
            "three": nn.Conv3d(4, 6, 2),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "up1": nn.ConvTranspose1d(4, 6, 3),
            "up2": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "bn": nn.BatchNorm2d(6),
            "gn": nn.GroupNorm(2, 6),
        }
    )


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(4, 6))
    return nn.ModuleDict(
        {
            "new": parametrizations.weight_norm(nn.Linear(4, 6)),
            "old": old,
            "spectral": parametrizations.spectral_norm(nn.ConvTranspose1d(4, 1, 1)),
            "table": parametrizations.weight_norm(nn.Embedding(9, 4)),
        }
    )


def frozen_backbone() -> nn.Module:
    model = nn.ModuleDict({"backbone": GPT(), "head": nn.Linear(8, 3)})
    model["backbone"].requires_grad_(False)
    return model


def shared() -> nn.Module:
    block = nn.Linear(5, 5)
    return nn.ModuleDict({"first": block, "middle": nn.Linear(5, 5), "second": block, "third": block})


def compiled() -> nn.Module:
    model = GPT("untied")
    model.blocks[1] = torch.compile(model.blocks[1])
    return torch.compile(model)


def gpt2() -> nn.Module:
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, **tokens))


def llama(tied: bool = False) -> nn.Module:
    widths = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**widths, **heads, tie_word_embeddings=tied))


def bert() -> nn.Module:
    widths = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 32, "max_position_embeddings": 8}
    return BertForSequenceClassification(BertConfig(**widths, num_hidden_layers=1, num_attention_heads=2, num_labels=5))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "gpt_tied": GPT,
    "gpt_untied": lambda: GPT("untied"),
    "gpt_functional": lambda: GPT(None),
    "gpt2": gpt2,
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "bert": bert,
    "cnn": cnn,
    "vit": ViT,
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
    "lstm": lambda: nn.LSTM(1, 4, bidirectional=True, proj_size=2),
    "gru_cell": lambda: nn.GRUCell(3, 4),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "norm_2d": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([4, 8]), RMSNormWithMatrix()),
    "weight_normed": weight_normed,
    "frozen_backbone": frozen_backbone,
    "shared": shared,
    "compiled": compiled,
    "fabric": lambda: _FabricModule(torch.compile(GPT()), strategy=None),
    "complex": lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.complex64)),
}


def groups_of(groups: ParameterGroups) -> dict[str, str]:
    return {route.name: route.group for route in groups.routes}


def reasons_of(groups: ParameterGroups) -> dict[str, str]:
    return {route.name: route.reason for route in groups.routes}


def keys_of(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != "params"}


# ---------------------------------------------------------------- what holds for every module


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


# ---------------------------------------------------------------- routing


def test_gpt_with_tied_head_routes_the_shared_weight_once_as_an_embedding() -> None:
    groups = split_parameters(GPT())
    assert [keys_of(group) for group in groups] == [
        {"name": "matrices", "orthogonalize": True, "transposed": False, "blocks": 1},
        {"name": "adamw", "orthogonalize": False},
    ]
    assert [name for name, _ in groups[0]["params"]] == [
        f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("qkv", "proj", "fc", "out")
    ]
    reasons = reasons_of(groups)
    assert reasons["wte.weight"] == "embedding, tied to lm_head.weight"
    assert "lm_head.weight" not in reasons
    assert (reasons["wpe.weight"], reasons["ln_f.weight"]) == ("embedding", "norm")
    assert (reasons["blocks.0.qkv.weight"], reasons["blocks.0.qkv.bias"]) == ("matrix", "bias")


def test_a_head_that_comes_before_its_embedding_is_still_tied() -> None:
    head, table = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    head.weight = table.weight
    groups = split_parameters(nn.ModuleDict({"head": head, "body": nn.Linear(4, 4), "table": table}))
    assert reasons_of(groups)["head.weight"] == "output head, tied to table.weight"


def test_a_bare_parameter_tied_to_an_embedding_is_an_output_head() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "body": nn.Linear(4, 4)})
    model.register_parameter("decoder", model["table"].weight)
    assert reasons_of(split_parameters(model))["decoder"] == "output head, tied to table.weight"


@pytest.mark.parametrize(("vocabulary", "width", "positions"), [(64, 8, 16), (8, 8, 8), (32, 8, 8), (16, 16, 4)])
def test_an_untied_head_is_found_by_its_width(vocabulary: int, width: int, positions: int) -> None:
    groups = split_parameters(GPT("untied", vocabulary, width, positions))
    heads = [route.name for route in groups.routes if route.reason == "output head"]
    assert heads == ["lm_head.weight"]
    assert len(groups[0]["params"]) == 8


@pytest.mark.parametrize(("vocabulary", "width", "positions"), [(64, 8, 16), (64, 8, 8), (32, 8, 8), (8, 8, 8)])
def test_no_hidden_layer_is_taken_for_the_head_of_a_model_without_one(
    vocabulary: int, width: int, positions: int
) -> None:
    groups = split_parameters(GPT(None, vocabulary, width, positions))
    assert len(groups[0]["params"]) == 8


def test_a_hidden_layer_as_wide_as_the_vocabulary_is_a_matrix_before_the_head() -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32))
    groups = groups_of(split_parameters(model))
    assert [groups[f"{i}.weight"] for i in range(4)] == ["adamw", "matrices", "matrices", "adamw"]


def test_a_hidden_layer_as_wide_as_the_vocabulary_is_a_matrix_before_a_classifier() -> None:
    model = nn.Sequential(nn.EmbeddingBag(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
    groups = groups_of(split_parameters(model))
    assert [groups[f"{i}.weight"] for i in (0, 1, 3)] == ["adamw", "matrices", "matrices"]


def test_a_value_head_after_the_output_head_does_not_hide_it() -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(8, 1))
    groups = groups_of(split_parameters(model))
    assert [groups[f"{i}.weight"] for i in range(4)] == ["adamw", "matrices", "adamw", "matrices"]


def test_hugging_face_gpt2_stores_its_matrices_transposed() -> None:
    groups = split_parameters(gpt2())
    assert [group["name"] for group in groups] == ["matrices_transposed", "adamw"]
    assert groups[0]["transposed"] is True
    assert [name.removeprefix("transformer.h.0.") for name, _ in groups[0]["params"]] == [
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ]
    reasons = reasons_of(groups)
    assert reasons["transformer.wte.weight"] == "embedding, tied to lm_head.weight"
    assert reasons["transformer.h.0.attn.c_attn.weight"] == "matrix, stored transposed"


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_llama_head_is_declared_and_its_norms_are_norms(tied: bool) -> None:
    groups = split_parameters(llama(tied))
    reasons = reasons_of(groups)
    assert sum(reason == "matrix" for reason in reasons.values()) == 7
    assert reasons["model.norm.weight"] == reasons["model.layers.0.input_layernorm.weight"] == "norm"
    assert reasons.get("lm_head.weight") == (None if tied else "output head")


class DeclaresHead(nn.Module):
    def __init__(self, declares: bool | None) -> None:
        super().__init__()
        self.body, self.head, self.declares = nn.Linear(4, 4), nn.Linear(4, 7), declares

    def get_output_embeddings(self) -> nn.Module | None:
        if self.declares is None:
            raise NotImplementedError
        return self.head if self.declares else None


@pytest.mark.parametrize(("declares", "group"), [(True, "adamw"), (False, "matrices"), (None, "matrices")])
def test_a_head_is_one_that_a_submodule_declares(declares: bool | None, group: str) -> None:
    groups = groups_of(split_parameters(nn.Sequential(DeclaresHead(declares))))
    assert (groups["0.head.weight"], groups["0.head.bias"]) == (group, "adamw")


def test_convolutions_are_flattened_and_transposed_ones_say_so() -> None:
    groups = split_parameters(cnn())
    names = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert names["matrices"] == ["one.weight", "two.weight", "three.weight", "depthwise.weight"]
    assert names["matrices_transposed"] == ["up1.weight", "up2.weight"]
    reasons = reasons_of(groups)
    assert reasons["two.weight"] == "matrix, flattened to 6 x 60"
    assert reasons["depthwise.weight"] == "matrix, flattened to 6 x 9"
    assert reasons["up1.weight"] == "matrix, flattened to 4 x 18, stored transposed"
    assert reasons["bn.weight"] == reasons["gn.bias"] == "norm"


def test_vision_transformer_tokens_tables_and_scales_take_adamw() -> None:
    groups = split_parameters(ViT())
    reasons = reasons_of(groups)
    vector = "vector with dimensions of size 1"
    assert reasons["cls_token"] == reasons["scale.gamma"] == reasons["attn.bias_k"] == vector
    assert reasons["pos_embed"] == reasons["extra_embeds.0"] == "embedding by its name"
    assert reasons["logit_scale"] == "scalar"
    assert [name for name, _ in groups[0]["params"]] == [
        "mix",
        "patch.weight",
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj.weight",
        "head.weight",
    ]


def test_attention_and_recurrent_weights_are_matrices_even_with_one_input() -> None:
    transformer = groups_of(split_parameters(ZOO["transformer"]()))
    assert {name for name, group in transformer.items() if group == "matrices"} == {
        name for name in transformer if name.endswith("weight") and "norm" not in name
    }
    lstm = groups_of(split_parameters(ZOO["lstm"]()))
    assert {name for name, group in lstm.items() if group == "matrices"} == {
        name for name in lstm if name.startswith("weight")
    }


def test_a_linear_with_one_output_is_a_matrix() -> None:
    assert groups_of(split_parameters(nn.Linear(4, 1)))["weight"] == "matrices"


def test_norms_take_adamw_whatever_their_shape() -> None:
    reasons = reasons_of(split_parameters(ZOO["norm_2d"]()))
    assert reasons["1.weight"] == reasons["1.bias"] == reasons["2.gain"] == "norm"


def test_a_linear_of_a_class_called_norm_is_a_matrix() -> None:
    class NormalizedLinear(nn.Linear):
        pass

    assert groups_of(split_parameters(NormalizedLinear(3, 4)))["weight"] == "matrices"


def test_weight_norm_keeps_its_direction_a_matrix_and_its_length_a_vector() -> None:
    reasons = reasons_of(split_parameters(weight_normed()))
    vector = "vector with dimensions of size 1"
    assert reasons["new.parametrizations.weight.original0"] == reasons["old.weight_g"] == vector
    assert reasons["new.parametrizations.weight.original1"] == reasons["old.weight_v"] == "matrix"
    assert reasons["spectral.parametrizations.weight.original"] == ("matrix, flattened to 4 x 1, stored transposed")
    assert reasons["table.parametrizations.weight.original1"] == "embedding"


def test_complex_parameters_take_adamw() -> None:
    assert reasons_of(split_parameters(ZOO["complex"]()))["1.weight"] == "complex"


def test_frozen_parameters_are_in_no_group_but_have_templates_to_be_unfrozen_by() -> None:
    model = frozen_backbone()
    groups = split_parameters(model, blocks={"*.qkv.weight": 3})
    assert [name for group in groups for name, _ in group["params"]] == ["head.weight", "head.bias"]
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


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        checkpoint_wrapper,
        lambda module: _FabricModule(module, strategy=None),
        lambda module: _FabricModule(nn.DataParallel(torch.compile(module)), None, original_module=module),
    ],
    ids=["compile", "data_parallel", "checkpoint", "fabric", "fabric_data_parallel_compile"],
)
def test_wrappers_leave_no_trace(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = GPT("untied")
    expected = split_parameters(plain).routes
    assert split_parameters(wrap(plain)).routes == expected


def test_a_child_of_the_users_own_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 3)})
    assert list(groups_of(split_parameters(model))) == ["module.weight", "module.bias"]


@pytest.fixture
def fake_world() -> Iterator[None]:
    """A world of two of which only rank 0 exists: enough to shard, no collective does anything."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


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


# ---------------------------------------------------------------- globs


def test_globs_overrule_the_routing_in_both_directions() -> None:
    groups = split_parameters(ViT(), adamw=("mix", "patch.*"), orthogonalize="pos_embed")
    routes = {route.name: route for route in groups.routes}
    assert routes["mix"] == Route("mix", (8, 8), "adamw", "glob 'mix' in adamw")
    assert routes["patch.bias"].reason == "glob 'patch.*' in adamw"
    assert routes["pos_embed"].group == "matrices"
    assert routes["pos_embed"].reason == "glob 'pos_embed' in orthogonalize, flattened to 1 x 136"


def test_a_single_string_is_one_glob() -> None:
    by_string, by_tuple = (split_parameters(GPT(), adamw=globs) for globs in ("*.fc.weight", ("*.fc.weight",)))
    assert by_string.routes == by_tuple.routes
    assert groups_of(by_string)["blocks.1.fc.weight"] == "adamw"


def test_a_tied_parameter_matches_under_any_of_its_names() -> None:
    groups = split_parameters(GPT(), orthogonalize="lm_head.weight")
    assert groups_of(groups)["wte.weight"] == "matrices"
    assert reasons_of(groups)["wte.weight"] == "glob 'lm_head.weight' in orthogonalize, tied to lm_head.weight"


def test_globs_match_cleaned_names_only() -> None:
    assert groups_of(split_parameters(compiled(), adamw="blocks.1.fc.weight"))["blocks.1.fc.weight"] == "adamw"
    with pytest.raises(ValueError, match="no match"):
        split_parameters(compiled(), adamw="_orig_mod.*")


@given(globs=st.lists(st.sampled_from(["*", "blocks.*", "*.weight", "*.bias", "wte.*", "*.0.*", "*[12].fc*"])))
@settings(deadline=None, max_examples=50)
def test_adamw_globs_move_what_they_match_and_nothing_else(globs: list[str]) -> None:
    model = GPT()
    before = groups_of(split_parameters(model))
    expected = {
        name: "adamw" if any(fnmatchcase(name, glob) for glob in globs) else group for name, group in before.items()
    }
    if "matrices" in expected.values():
        assert groups_of(split_parameters(model, adamw=globs)) == expected
    else:
        with pytest.raises(ValueError, match="trainable matrix"):
            split_parameters(model, adamw=globs)


# ---------------------------------------------------------------- blocks


def test_equal_blocks_make_a_group_of_their_own() -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": 3})
    assert [group["name"] for group in groups] == ["matrices_blocks_3", "matrices", "adamw"]
    assert groups[0]["blocks"] == 3
    assert len(groups[0]["params"]) == 2


def test_unequal_blocks_keep_their_order() -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": (16, 4, 4)})
    assert groups[0]["name"] == "matrices_blocks_16_4_4"
    assert groups[0]["blocks"] == [16, 4, 4]


def test_blocks_of_a_transposed_parameter_are_its_stored_columns() -> None:
    groups = split_parameters(gpt2(), blocks={"*.c_attn.weight": [8, 12, 4], "*.c_fc.weight": 4})
    assert [group["name"] for group in groups] == [
        "matrices_transposed_blocks_8_12_4",
        "matrices_transposed",
        "matrices_transposed_blocks_4",
        "adamw",
    ]
    up = split_parameters(nn.ConvTranspose1d(2, 5, 3), blocks={"weight": 15})
    assert up[0]["name"] == "matrices_transposed_blocks_15"


@pytest.mark.parametrize("whole", [1, [24]])
def test_one_block_is_a_whole_matrix(whole: int | list[int]) -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": whole})
    assert [group["name"] for group in groups] == ["matrices", "adamw"]


@given(
    rows=st.integers(1, 40),
    asked=st.one_of(st.integers(-1, 42), st.lists(st.integers(-3, 20), max_size=5)),
)
@settings(deadline=None)
def test_blocks_are_accepted_exactly_when_they_fill_the_rows(rows: int, asked: int | list[int]) -> None:
    module = nn.Linear(2, rows, bias=False)
    fits = (
        asked > 0 and rows % asked == 0
        if isinstance(asked, int)
        else sum(asked) == rows and all(size > 0 for size in asked)
    )
    if fits:
        blocks = split_parameters(module, blocks={"weight": asked})[0]["blocks"]
        assert blocks == (1 if asked == [rows] else asked)
    else:
        with pytest.raises(ValueError, match=f"weight to divide its {rows} rows"):
            split_parameters(module, blocks={"weight": asked})


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("keyword", ["adamw", "orthogonalize", "blocks"])
def test_a_glob_that_matches_nothing_names_the_nearest_parameters(keyword: str) -> None:
    globs = {"*.qvk.weight": 3} if keyword == "blocks" else ["*.qvk.weight"]
    with pytest.raises(ValueError, match=rf"'\*.qvk.weight' in {keyword} .* Nearest: blocks.0.qkv.weight"):
        split_parameters(GPT(), **{keyword: globs})


def test_a_parameter_in_both_lists_is_named_with_both_globs() -> None:
    with pytest.raises(ValueError, match=r"on blocks.0.fc.weight, but got glob '\*.fc.\*' in adamw and glob '\*fc"):
        split_parameters(GPT(), adamw="*.fc.*", orthogonalize="*fc.weight")


def test_a_vector_or_a_complex_parameter_cannot_be_orthogonalized() -> None:
    with pytest.raises(ValueError, match=r"'\*qkv\*' in orthogonalize .* blocks.0.qkv.bias has shape \(24,\)"):
        split_parameters(GPT(), orthogonalize="*qkv*")
    with pytest.raises(ValueError, match=r"1.weight is complex"):
        split_parameters(ZOO["complex"](), orthogonalize="1.weight")


def test_a_module_without_a_matrix_is_refused_with_what_there_is() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"in Sequential, but got 0.weight \(embedding\), 1.weight \(norm\)") as error:
        split_parameters(model)
    assert "orthogonalize=(" in str(error.value)
    with pytest.raises(ValueError, match="got no parameters"):
        split_parameters(nn.ReLU())
    with pytest.raises(ValueError, match=r"weight \(requires_grad=False; else matrix\)"):
        split_parameters(nn.Linear(3, 3).requires_grad_(False))


def test_the_list_of_a_module_without_a_matrix_is_cut() -> None:
    with pytest.raises(ValueError, match=r"19.weight \(embedding\) and 5 more\."):
        split_parameters(nn.Sequential(*(nn.Embedding(2, 2) for _ in range(25))))


def test_blocks_for_what_is_no_matrix_say_where_it_went() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.qkv.bias takes AdamW \(bias\)"):
        split_parameters(GPT(), blocks={"*.qkv.*": 3})
    with pytest.raises(ValueError, match=r"blocks.0.qkv.weight takes AdamW \(glob '\*.0.\*' in adamw\)"):
        split_parameters(GPT(), adamw="*.0.*", blocks={"*.qkv.weight": 3})


def test_two_blocks_globs_for_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for blocks.0.qkv.weight, but got \*.qkv.weight and \*.0.qkv.\*\."):
        split_parameters(GPT(), blocks={"*.qkv.weight": 3, "*.0.qkv.*": 3})


def test_blocks_that_do_not_fit_are_named_with_the_rows() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.qkv.weight to divide its 24 rows .* Got \[16, 4\]\."):
        split_parameters(GPT(), blocks={"*.qkv.weight": [16, 4]})
    with pytest.raises(ValueError, match=r"c_attn.weight to divide its 24 rows .* Got 16\."):
        split_parameters(gpt2(), blocks={"*.c_attn.weight": 16})


def test_a_lazy_module_asks_for_a_dummy_forward() -> None:
    with pytest.raises(ValueError, match=r"1.weight to be initialized: .*dummy forward"):
        split_parameters(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)))


# ---------------------------------------------------------------- the table


def test_the_table_has_a_line_per_parameter_and_counts() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 2, bias=False))
    model[2].requires_grad_(False)
    assert str(split_parameters(model)) == "\n".join(
        [
            "name      shape  group     reason",
            "0.weight  5 x 4  adamw     embedding",
            "1.weight  6 x 4  matrices  matrix",
            "1.bias    6      adamw     bias",
            "2.weight  2 x 6  frozen    requires_grad=False; else matrix",
            "4 parameters: 1 matrices (24 elements), 2 AdamW (26 elements), 1 frozen (12 elements)",
        ]
    )


@pytest.mark.parametrize("build", ZOO.values(), ids=ZOO)
def test_the_counts_of_the_table_cover_all_elements(build: Callable[[], nn.Module]) -> None:
    module = build()
    lines = str(split_parameters(module)).splitlines()
    numbers = [int(word.strip("(").replace(",", "")) for word in lines[-1].split() if word.strip("(")[0].isdigit()]
    assert numbers[0] == numbers[1] + numbers[3] + numbers[5] == len(lines) - 2
    assert numbers[2] + numbers[4] + numbers[6] == sum(math.prod(p.shape) for p in module.parameters())
