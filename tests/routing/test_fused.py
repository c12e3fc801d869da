"""Fused projections: which are known, what the table says of them, and `blocks` by words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from lightning_namo import NAMO, OptimizerCallback, build_optimizer, optimize_with
from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, gpt2

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}


def blocks_of(module: nn.Module, blocks) -> dict[str, int | list[int]]:
    """The blocks of every matrix that has more than one."""
    groups = split_parameters(module, blocks=blocks)
    return {name: group["blocks"] for group in groups for name, _ in group["params"] if group.get("blocks", 1) != 1}


def said_of(module: nn.Module) -> dict[str, str]:
    """What the table says of fused matrices."""
    routes = split_parameters(module).routes
    return {r.name: r.reason[r.reason.index("fused") :] for r in routes if "fused" in r.reason}


class Attention(nn.Module):
    """Grouped-query attention, by the names of many implementations."""

    def __init__(self, name: str = "qkv", interleaved: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        setattr(self, name, nn.Linear(16, (4 + 2 * 2) * 8))
        self.out, self.norm = nn.Linear(32, 16), nn.LayerNorm(16)


def test_multi_head_attention_is_three_matrices_or_those_of_its_heads() -> None:
    model = nn.Sequential(nn.MultiheadAttention(12, 3), nn.LayerNorm(12))
    assert said_of(model) == {"0.in_proj_weight": "fused: 3 blocks possible"}
    assert blocks_of(model, "auto") == {"0.in_proj_weight": 3}
    assert blocks_of(model, "heads") == {"0.in_proj_weight": 9}
    apart = nn.Sequential(nn.MultiheadAttention(12, 3, kdim=5, vdim=7), nn.LayerNorm(12))
    assert said_of(apart) == {}
    assert blocks_of(apart, "heads") == {f"0.{name}_proj_weight": 3 for name in "qkv"}


def test_the_conv1d_of_gpt2_is_three_matrices_of_its_columns() -> None:
    names = ["transformer.h.0.attn.c_attn.weight"]
    assert list(said_of(gpt2())) == names
    assert blocks_of(gpt2(), "auto") == {names[0]: 3}
    assert blocks_of(gpt2(), "heads") == {names[0]: 6}
    crossed = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=64, add_cross_attention=True)
    )
    assert blocks_of(crossed, "auto")["transformer.h.0.crossattention.c_attn.weight"] == 2


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "qkv_proj", "c_attn", "to_qkv"])
def test_groups_of_queries_give_blocks_of_their_sizes(name: str) -> None:
    model = Attention(name)
    assert said_of(model) == {f"{name}.weight": "fused: 3 blocks possible"}
    assert blocks_of(model, "auto") == {f"{name}.weight": [32, 16, 16]}
    assert blocks_of(model, "heads") == {f"{name}.weight": 8}
    assert blocks_of(model, {f"{name}.weight": 1}) == {}


def test_heads_that_are_stored_one_after_the_other_are_no_three_blocks() -> None:
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=4))
    (name,) = said_of(bloom)
    assert said_of(bloom)[name] == "fused: 12 blocks possible, by heads"
    assert blocks_of(bloom, "auto") == {}
    assert blocks_of(bloom, "heads") == {name: 12}
    with pytest.raises(
        ValueError,
        match=r"no parts are known. They are stored head by head: say 'heads'",
    ):
        blocks_of(bloom, {"*.query_key_value.weight": "auto"})


def test_query_key_and_value_apart_are_divided_by_heads_only() -> None:
    config = transformers.LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=24)
    model = transformers.LlamaForCausalLM(config)
    assert said_of(model) == {}
    layer = "model.layers.0.self_attn"
    heads = {f"{layer}.q_proj.weight": 4, f"{layer}.k_proj.weight": 2, f"{layer}.v_proj.weight": 2}
    assert blocks_of(model, "auto") == {}
    assert blocks_of(model, "heads") == heads
    assert blocks_of(model, {"*.q_proj.weight": "heads"}) == {f"{layer}.q_proj.weight": 4}


def test_the_projections_of_mamba_and_the_gates_of_recurrent_layers_are_known() -> None:
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1))
    assert blocks_of(mamba, "auto") == {"backbone.layers.0.mixer.in_proj.weight": 2}
    config = transformers.Mamba2Config(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_heads=4, head_dim=4, n_groups=1, state_size=5
    )
    mamba2 = transformers.Mamba2ForCausalLM(config)
    assert said_of(mamba2) == {"backbone.layers.0.mixer.in_proj.weight": "fused: 3 blocks possible"}
    assert blocks_of(mamba2, "auto") == {"backbone.layers.0.mixer.in_proj.weight": [16, 26, 4]}
    lstm = nn.Sequential(nn.LSTM(3, 4, proj_size=2), nn.GRUCell(4, 5), nn.RNN(5, 5), nn.LayerNorm(5))
    assert blocks_of(lstm, "auto") == {
        "0.weight_ih_l0": 4,
        "0.weight_hh_l0": 4,
        "1.weight_ih": 3,
        "1.weight_hh": 3,
    }


def test_a_name_without_the_shape_is_no_evidence() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 20), "in_proj": nn.Linear(8, 16), "norm": nn.LayerNorm(8)})
    assert said_of(model) == {}
    assert blocks_of(model, "auto") == {}


def test_words_for_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected blocks to be 'auto', 'heads' or a mapping .* Got 'head'."):
        split_parameters(GPT(), blocks="head")
    with pytest.raises(
        ValueError,
        match=r"Expected blocks of '\*.qkv.weight' to be 'auto', 'heads', a number of blocks, or the rows of each",
    ):
        split_parameters(GPT(), blocks={"*.qkv.weight": "qkv"})
    with pytest.raises(
        ValueError, match=r"Expected blocks='heads' to match .* of blocks.0.proj.weight \(8, 8\) no heads"
    ):
        split_parameters(GPT(), blocks={"*.proj.weight": "heads"})


def test_blocks_by_word_step_as_the_same_blocks_by_number() -> None:
    weights = []
    for blocks in ("auto", {"qkv.weight": [32, 16, 16]}):
        torch.manual_seed(0)
        model = Attention()
        optimizer = build_optimizer(model, NAMO, blocks=blocks, orthogonalizer="svd")
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        weights.append(model.qkv.weight.detach())
    assert torch.equal(*weights)


def test_heads_of_a_wider_attention_have_the_width_that_the_module_gives_them() -> None:
    wide = nn.Module()
    wide.heads = 8
    for name in ("to_q", "to_k", "to_v"):
        wide.add_module(name, nn.Linear(16, 32))
    wide.norm = nn.LayerNorm(16)
    assert blocks_of(wide, "heads") == {f"to_{name}.weight": 8 for name in "qkv"}


class QKVAttentionLegacy(nn.Module):
    """By the name of what guided diffusion's AttentionBlock keeps, which takes q, k and v head by head."""


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_module_that_says_that_heads_come_first_is_believed(interleaved: bool, legacy: bool) -> None:
    attention = nn.Module()
    attention.num_heads, attention.norm = 4, nn.LayerNorm(16)
    attention.head_first = interleaved and not legacy
    attention.attention = QKVAttentionLegacy() if interleaved and legacy else nn.Identity()
    attention.qkv = nn.Conv2d(16, 48, 1)
    attention.body = nn.Linear(16, 16)
    model = nn.Sequential(nn.Conv2d(2, 16, 1), attention)
    assert blocks_of(model, "auto") == ({} if interleaved else {"1.qkv.weight": 3})
    assert blocks_of(model, "heads") == {"1.qkv.weight": 12}


def test_a_configuration_without_one_number_of_heads_for_all_layers_is_no_error() -> None:
    class PerLayer:
        @property
        def num_attention_heads(self) -> int:
            raise RuntimeError("differs from layer to layer")  # as transformers' heterogeneous configurations do

    attention = Attention()
    attention.config = PerLayer()
    assert blocks_of(attention, "heads") == {}


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"blocks": 3}, "Expected blocks to be 'auto', 'heads' or a mapping"),
        ({"blocks": {"*": 3.0}}, "a number of blocks, or the rows of each. Got 3.0"),
        ({"blocks": {"*": True}}, "a number of blocks, or the rows of each. Got True"),
        ({"adamw": 3}, "Expected adamw to be globs over parameter names. Got 3"),
        ({"heads": "matrices"}, "Expected heads to be 'adamw' or 'matrix'. Got 'matrices'"),
    ],
)
def test_wrong_arguments_are_refused_where_they_are_given(routing, message: str) -> None:
    for given in (
        lambda: split_parameters(GPT(), **routing),
        lambda: build_optimizer(GPT(), NAMO, **routing),
        lambda: optimize_with(NAMO, **routing),
        lambda: OptimizerCallback(**routing),
    ):
        with pytest.raises(ValueError, match=message):
            given()


def _on_meta(config: str, model: str, **sizes) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize(
    ("model", "layer", "heads"),
    [
        (
            lambda: _on_meta(
                "GPTBigCodeConfig", "GPTBigCodeModel", n_embd=16, n_head=4, n_layer=1, vocab_size=40, multi_query=False
            ),
            "h.0.attn.c_attn.weight",
            12,
        ),
        (
            lambda: _on_meta(
                "CodeGenConfig", "CodeGenModel", n_embd=32, n_head=8, n_layer=1, vocab_size=40, rotary_dim=4
            ),
            "h.0.attn.qkv_proj.weight",
            24,
        ),
        (
            lambda: _on_meta(
                "MiniMaxConfig",
                "MiniMaxModel",
                **COMMON,
                intermediate_size=24,
                num_key_value_heads=4,
                head_dim=8,  # heads * head_dim is not the width
                num_local_experts=2,
                layer_types=["linear_attention"],
            ),
            "layers.0.self_attn.qkv_proj.weight",
            12,
        ),
    ],
    ids=["gpt_bigcode", "codegen", "minimax"],
)
def test_classes_that_store_heads_one_after_the_other_are_known(model, layer: str, heads: int) -> None:
    module = model()
    assert said_of(module)[layer] == f"fused: {heads} blocks possible, by heads"
    assert layer not in blocks_of(module, "auto")
    assert blocks_of(module, "heads")[layer] == heads


@pytest.mark.parametrize(("key", "value", "blocks"), [(4, 16, [4, 4, 16]), (8, 8, 3), (5, 16, 1)])
def test_linear_attention_has_keys_and_values_of_its_own_sizes(key: int, value: int, blocks: int | list[int]) -> None:
    attention = nn.Module()
    attention.key_dim, attention.value_dim = key, value
    attention.in_proj_qkv, attention.norm = nn.Linear(8, 24), nn.LayerNorm(8)
    assert blocks_of(attention, "auto") == ({} if blocks == 1 else {"in_proj_qkv.weight": blocks})


def test_the_grouped_linear_of_deepseek_v4_is_a_batch() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

    model = nn.ModuleDict({"it": DeepseekV4GroupedLinear(6, 8, 4), "norm": nn.LayerNorm(8)})
    routes = {route.name: route for route in split_parameters(model).routes}
    assert (routes["it.weight"].group, routes["it.weight"].confidence) == ("matrices_batched_4", "sure")


def test_the_pairs_of_zamba_are_not_two_blocks() -> None:
    class ZambaMambaMixer(nn.Module):
        """A stand-in by the name of the class, whose small configurations cannot be built."""

        def __init__(self) -> None:
            super().__init__()
            self.intermediate_size, self.A_log = 8, nn.Parameter(torch.zeros(2, 4, 3))
            self.in_proj, self.norm = nn.Linear(4, 16), nn.LayerNorm(4)

    assert blocks_of(ZambaMambaMixer(), "auto") == {}
