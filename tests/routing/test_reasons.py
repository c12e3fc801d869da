"""Why a parameter takes AdamW, or is a matrix: by identity and by module."""

from torch import nn

from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, ZOO, ViT, cnn, gpt2, groups_of, keys_of, reasons_of, weight_normed


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
    assert (reasons["blocks.0.proj.weight"], reasons["blocks.0.qkv.bias"]) == ("matrix", "bias")


def test_a_head_that_comes_before_its_embedding_is_still_tied() -> None:
    head, table = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    head.weight = table.weight
    groups = split_parameters(nn.ModuleDict({"head": head, "body": nn.Linear(4, 4), "table": table}))
    assert reasons_of(groups)["head.weight"] == "output head, tied to table.weight"


def test_a_bare_parameter_tied_to_an_embedding_is_an_output_head() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "body": nn.Linear(4, 4)})
    model.register_parameter("decoder", model["table"].weight)
    assert reasons_of(split_parameters(model))["decoder"] == "output head, tied to table.weight"


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
    assert reasons["transformer.h.0.attn.c_proj.weight"] == "matrix, stored transposed"


def test_convolutions_are_flattened_and_transposed_ones_say_so() -> None:
    groups = split_parameters(cnn())
    names = {group["name"]: [name for name, _ in group["params"]] for group in groups}
    assert names["matrices"] == ["two.weight", "three.weight"]
    assert names["matrices_transposed"] == ["up1.weight"]
    assert "up2.weight" in names["matrices_batched_2_transposed"]
    reasons = reasons_of(groups)
    assert reasons["two.weight"] == "matrix, flattened to 6 x 60"
    assert reasons["one.weight"] == "first layer, a convolution"
    assert reasons["depthwise.weight"] == "depthwise convolution"
    assert reasons["up1.weight"] == "matrix, flattened to 4 x 18, stored transposed"
    assert reasons["bn.weight"] == reasons["gn.bias"] == "norm"


def test_vision_transformer_tokens_tables_and_scales_take_adamw() -> None:
    groups = split_parameters(ViT())
    reasons = reasons_of(groups)
    assert reasons["cls_token"] == reasons["register_tokens"] == "token"
    assert (reasons["scale.gamma"], reasons["attn.bias_k"]) == ("layer scale", "bias")
    assert (reasons["pos_embed"], reasons["extra_embeds.0"]) == ("position table", "embedding by its name")
    assert reasons["logit_scale"] == "scalar"
    assert [name for name, _ in groups[0]["params"]] == [
        "mix",
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj.weight",
    ]
    assert (reasons["patch.weight"], reasons["head.weight"]) == (
        "first layer, a convolution",
        "output head, called head",
    )


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
    assert reasons["new.parametrizations.weight.original1"] == reasons["old.weight_v"]
    assert reasons["old.weight_v"].startswith("matrix")
    assert reasons["spectral.parametrizations.weight.original"] == ("matrix, flattened to 4 x 1, stored transposed")
    assert reasons["table.parametrizations.weight.original1"] == "embedding"


def test_complex_parameters_take_adamw() -> None:
    assert reasons_of(split_parameters(ZOO["complex"]()))["1.weight"] == "complex"
