"""Parameters that are not matrices, by class, by name, or by their siblings; and matrices that only look so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import reasons_of


def module_of(name: str, *, beside: nn.Module | None = None, **parameters: tuple[int, ...]) -> nn.Module:
    """A module of a class of that name with bare parameters of these shapes, in a model with a matrix."""
    module = type(name, (nn.Module,), {})()
    for label, shape in parameters.items():
        module.register_parameter(label, nn.Parameter(torch.zeros(shape)))
    if beside is not None:
        module.experts = beside
    return nn.ModuleDict({"it": module, "body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})


def route_of(model: nn.Module, label: str) -> tuple[str, str]:
    """Whether a parameter takes AdamW, and the reason without what is said of shapes."""
    route = next(route for route in split_parameters(model).routes if route.name == f"it.{label}")
    return ("adamw" if route.group == "adamw" else "matrix"), route.reason.split(",")[0]


@pytest.mark.parametrize(
    ("label", "shape", "reason"),
    [
        ("gate_up_proj_bias", (4, 6), "bias"),
        ("r_w_bias", (2, 4), "bias"),
        ("attention_biases", (4, 9), "bias"),
        ("relative_position_bias_table", (9, 4), "relative-position table"),
        ("relative_attention_bias", (9, 4), "relative-position table"),
        ("rel_pos_h", (9, 4), "relative-position table"),
        ("emb_rel_k", (1, 9, 4), "relative-position table"),
        ("pos_table", (9, 4), "position table"),
        ("absolute_position_embeddings", (1, 9, 4), "position table"),
        ("A_log", (6, 4), "state-space A"),
        ("dt_proj_weight", (2, 6, 4), "state-space step size (dt)"),
        ("codebook", (9, 4), "codebook"),
        ("codevectors", (1, 9, 4), "codebook"),
        ("latents", (9, 4), "latents"),
        ("query", (9, 4), "latents"),
        ("object_queries", (9, 4), "latents"),
        ("cls_token", (2, 1, 4), "token"),
        ("mask_tokens", (3, 1, 1, 4), "token"),
        ("register_tokens", (1, 3, 4), "token"),
        ("text_prompt", (1, 3, 4), "prompt"),
        ("gamma", (4, 1, 1), "layer scale"),
        ("layer_scale_1", (4, 1), "scale"),
        ("lambda_1", (4, 2), "layer scale"),
        ("correction_coefs", (4, 4), "coefficients"),
        ("conv_weight", (6, 1, 4), "depthwise convolution"),
        ("layer_norm_weight", (2, 4), "norm"),
        ("word_embeddings", (9, 4), "embedding by its name"),
    ],
)
def test_bare_parameters_are_known_by_whole_words_of_their_names(label, shape, reason) -> None:
    assert route_of(module_of("Thing", **{label: shape}), label) == ("adamw", reason)


@pytest.mark.parametrize(
    "label",
    [
        "unbiased",
        "reposition",
        "tokenwise",
        "scaled_weight",
        "proj",
        "latently",
        "reembed",
        "token_proj",
        "pos_proj_weight",
    ],
)
def test_parts_of_words_and_what_is_projected_say_nothing(label: str) -> None:
    assert route_of(module_of("Thing", **{label: (5, 4)}), label) == ("matrix", "matrix")


def test_letters_of_state_space_models_are_taken_for_those_only_beside_others() -> None:
    model = module_of("Mixer", A=(6, 4), D=(6, 4), dt_bias=(6,))
    assert route_of(model, "A") == ("adamw", "state-space A")
    assert route_of(model, "D") == ("adamw", "state-space D")
    assert route_of(module_of("S4D", D=(6, 4)), "D") == ("adamw", "state-space D")
    adapter = module_of("LowRank", A=(2, 4), B=(4, 2), D=(4, 4))
    assert [route_of(adapter, label)[0] for label in ("A", "B")] == ["matrix", "matrix"]


def test_a_query_beside_a_key_is_a_projection() -> None:
    assert route_of(module_of("Attention", query=(4, 4), key=(4, 4)), "query") == ("matrix", "matrix")


@pytest.mark.parametrize(
    ("name", "label", "is_norm"),
    [
        ("LlamaRMSNorm", "scale", True),
        ("BatchNormAct2d", "weight", True),
        ("LayerNorm2d", "weight", True),
        ("T5LayerNorm", "weight", True),
        ("Layernorm", "weight", True),
        ("RMSNormGated", "weight", True),
        ("LayerNormLinear", "weight", False),  # Transformer Engine's
        ("LayerNormMLP", "fc1_weight", False),
        ("NormalizingFlow", "weight", False),
        ("NormformerBlock", "weight", False),
        ("Abnormal", "weight", False),
    ],
)
def test_norms_are_known_by_a_whole_word_of_their_class(name: str, label: str, is_norm: bool) -> None:
    expected = ("adamw", "norm") if is_norm else ("matrix", "matrix")
    assert route_of(module_of(name, **{label: (5, 4)}), label) == expected


def test_a_norm_inside_of_a_layer_of_transformer_engine_is_a_norm() -> None:
    model = module_of("LayerNormLinear", layer_norm_weight=(4,), layer_norm_bias=(4,), weight=(6, 4), bias=(6,))
    assert [route_of(model, label)[1] for label in ("layer_norm_weight", "weight", "bias")] == [
        "norm",
        "matrix",
        "bias",
    ]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 6, 4))


@pytest.mark.parametrize("name", ["gate", "gating", "router", "wg", "w_gate", "w_noise", "shared_expert_gate"])
def test_gates_are_routers_beside_experts(name: str) -> None:
    for gate in (nn.Linear(4, 3, bias=False), nn.Parameter(torch.zeros(4, 3))):
        model = module_of("Layer", beside=Experts())
        setattr(model["it"], name, gate)
        label = name if isinstance(gate, nn.Parameter) else f"{name}.weight"
        assert route_of(model, label) == ("adamw", "router")


@pytest.mark.parametrize("name", ["gate", "gate_proj", "gating"])
def test_gates_of_gated_layers_are_matrices(name: str) -> None:
    model = module_of("GatedMLP", up=(4, 6))
    setattr(model["it"], name, nn.Linear(4, 6))
    assert route_of(model, f"{name}.weight") == ("matrix", "matrix")
    of_expert = module_of("MixtureMoeMLP", up=(4, 6))
    of_expert["it"].gate_proj = nn.Linear(4, 6)
    assert route_of(of_expert, "gate_proj.weight") == ("matrix", "matrix")


@pytest.mark.parametrize("name", ["TopKRouter", "MoEGate", "SwitchRouter"])
def test_routers_are_known_by_their_class(name: str) -> None:
    model = nn.ModuleDict({"it": nn.ModuleDict({"gate": module_of(name, weight=(3, 4))["it"], "experts": Experts()})})
    model["body"] = nn.Linear(4, 4)
    assert route_of(model, "gate.weight") == ("adamw", "router")


def test_a_network_that_routes_is_a_router_as_a_whole() -> None:
    model = nn.ModuleDict({"it": nn.ModuleDict({"router": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))})})
    model["body"] = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert route_of(model, "router.0.weight") == route_of(model, "router.2.weight") == ("adamw", "router")


def test_lists_of_gates_and_nets_of_gates_are_routers_beside_experts() -> None:
    for name, gate in (("gates", nn.ModuleList([nn.Linear(4, 3)])), ("gating_network", nn.Sequential(nn.Linear(4, 3)))):
        model = module_of("Layer", beside=Experts())
        model["it"].add_module(name, gate)
        assert route_of(model, f"{name}.0.weight") == ("adamw", "router")


@pytest.mark.parametrize("name", ["MyModel", "ToyTransformer", "SimpleNetwork", "HyperHead"])
def test_the_name_of_a_user_s_model_is_no_evidence(name: str) -> None:
    routes = {route.name: route for route in split_parameters(module_of(name, mystery=(5, 4))).routes}
    assert routes["it.mystery"].confidence == "please check"


def test_a_table_of_a_class_called_embedding_is_one() -> None:
    model = module_of("VocabParallelEmbedding", weight=(9, 4))
    assert route_of(model, "weight") == ("adamw", "embedding")


def test_layers_whose_names_say_that_they_hold_no_features_take_adamw() -> None:
    layers = {"dt_proj": nn.Linear(2, 4), "correction_coefs": nn.Linear(2, 2), "rel_pos_x_bias": nn.Linear(8, 2)}
    model = nn.ModuleDict({"it": nn.ModuleDict(layers), "body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    found = [route_of(model, f"{name}.weight") for name in layers]
    assert found == [
        ("adamw", "state-space step size (dt)"),
        ("adamw", "coefficients"),
        ("adamw", "relative-position table"),
    ]


def test_what_is_told_by_a_glob_is_sure_and_what_is_not_is_not() -> None:
    model = module_of("Thing", mystery=(5, 4), kernel=(5, 4), stack=(3, 5, 4))
    confidence = {route.name: route.confidence for route in split_parameters(model).routes}
    assert confidence["it.mystery"] == confidence["it.stack"] == "please check"
    assert (confidence["it.kernel"], confidence["body.0.weight"]) == ("assumed", "sure")
    told = split_parameters(model, orthogonalize="it.mystery", batched="it.stack", adamw="it.kernel")
    assert {route.confidence for route in told.routes} == {"sure"}
    named = {r.name: r.confidence for r in split_parameters(model, orthogonalize="it.stack").routes}
    assert named["it.stack"] == "assumed"  # that it is a matrix is told, that it is a batch is not


@pytest.mark.parametrize(
    ("layers", "first"),
    [
        ({"conv": nn.Conv2d(3, 8, 4), "more": nn.Conv2d(8, 8, 3)}, {"conv"}),
        ({"conv": nn.Conv1d(80, 8, 3), "more": nn.Conv1d(8, 8, 3)}, {"conv"}),
        ({"up": nn.Linear(4, 4), "patch_embed": nn.Conv2d(7, 8, 4)}, {"patch_embed"}),
        ({"up": nn.Linear(4, 4), "patch_embedding": nn.Linear(48, 8)}, {"patch_embedding"}),
        ({"up": nn.Linear(4, 4), "stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))}, {"stem.0", "stem.1"}),
        ({"up": nn.Linear(4, 4), "conv": nn.Conv2d(3, 4, 3)}, {"conv"}),
        ({"up": nn.Linear(4, 4), "patch_merger": nn.Linear(16, 4)}, set()),
        ({"table": nn.Embedding(9, 4), "conv": nn.Conv1d(4, 4, 3)}, set()),
        ({"conv": nn.Conv2d(3, 8, 4)}, set()),
    ],
)
def test_first_layers_take_adamw_unless_the_user_wants_it_otherwise(layers, first: set[str]) -> None:
    model = nn.ModuleDict(layers)
    model["body"] = (
        nn.Sequential(nn.LayerNorm(4)) if len(layers) == 1 else nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    )
    reasons = reasons_of(split_parameters(model))
    assert {
        name.removesuffix(".weight") for name, reason in reasons.items() if reason.startswith("first layer")
    } == first
    matrices = split_parameters(model, first_layers="matrix")[0]
    names = {name.removesuffix(".weight") for name, _ in matrices["params"]}
    assert first <= names
    assert matrices["orthogonalize"]
    with pytest.raises(ValueError, match=r"Expected first_layers to be 'adamw' or 'matrix'. Got True."):
        split_parameters(model, first_layers=True)
