"""Why a parameter takes AdamW, or is a matrix: by identity and by module."""

import pytest
from torch import nn

from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, ZOO, ViT, cnn, gpt2, groups_of, keys_of, llama, reasons_of, weight_normed


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
    assert names["matrices"] == ["one.weight", "two.weight", "three.weight"]
    assert names["matrices_transposed"] == ["up1.weight"]
    assert "up2.weight" in names["matrices_batched_2_transposed"]
    reasons = reasons_of(groups)
    assert reasons["two.weight"] == "matrix, flattened to 6 x 60"
    assert reasons["depthwise.weight"] == "depthwise convolution"
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
