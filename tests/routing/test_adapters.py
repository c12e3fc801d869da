"""Adapters: A and B of peft's and litgpt's LoRA are matrices; adapters without a matrix are refused in a few words."""

from __future__ import annotations

import litgpt
import peft
import pytest
import torch
import transformers
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from torch import nn

from lightning_namo import NAMO, build_optimizer, split_parameters

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def trained(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Group and reason of every trainable parameter, by its name from the layer on."""
    routes = [route for route in split_parameters(model).routes if route.group != "frozen"]
    return {route.name.removeprefix("base_model.model."): (route.group, route.reason) for route in routes}


def test_the_a_and_b_of_peft_are_matrices_those_of_a_head_too() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    layers = ("model.layers.0.self_attn.q_proj", "lm_head")
    assert trained(model) == {
        f"{layer}.lora_{side}.default.weight": ("matrices", "matrix") for layer in layers for side in "AB"
    }


def test_adapters_of_an_embedding_and_magnitudes_take_adamw() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True))
    routes = trained(model)
    assert routes["model.embed_tokens.lora_embedding_A.default"] == ("adamw", "embedding by its name")
    assert routes["model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight"] == ("adamw", "vector")


def test_a_classifier_that_peft_trains_beside_adapters_is_a_head() -> None:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    routes = trained(model)
    assert routes["classifier.modules_to_save.default.weight"] == ("adamw", "output head, called classifier")
    assert sum(group == "matrices" for group, _ in routes.values()) == 2


def test_the_experts_in_one_a_of_peft_are_a_batch_and_their_b_is_to_be_checked() -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora)
    groups = split_parameters(model)
    a, b = (route for route in groups.routes if route.group != "frozen")
    assert (a.group, a.shape, a.confidence) == ("matrices_batched_4", (8, 16), "sure")
    assert a.reason == "4 matrices 2 x 16, output features as rows, one for each expert that peft adapts"
    assert (b.group, b.confidence) == ("matrices", "please check")
    assert "Please check 1 of them" in str(groups)


def test_each_expert_of_an_a_is_orthogonalized_alone() -> None:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora)
    optimizer = build_optimizer(model, NAMO, lr=1.0, weight_decay=0.0, orthogonalizer="svd", shape_scale=None)
    (a,) = optimizer.param_groups[[g["name"] for g in optimizer.param_groups].index("matrices_batched_4")]["params"]
    before = a.detach().clone()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for update in (before - a.detach()).chunk(4):
        values = torch.linalg.svdvals(update)
        torch.testing.assert_close(values, values.mean().expand(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("enabled", [(True, True, True), (True, False, True)])
def test_the_fused_a_and_b_of_litgpt_are_blocks(enabled: tuple[bool, bool, bool]) -> None:
    query, key, value = enabled
    sizes = {"n_layer": 1, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "head_size": 4, "padded_vocab_size": 32}
    config = Config(**sizes, lora_r=2, lora_alpha=2, lora_query=query, lora_key=key, lora_value=value, lora_mlp=True)
    model = GPT(config)
    mark_only_lora_as_trainable(model)
    groups = split_parameters(model)
    blocks = {name: group["blocks"] for group in groups for name, _ in group["params"]}
    a, b = (blocks[f"transformer.h.0.attn.qkv.lora_{side}"] for side in "AB")
    assert (a, b) == ((3, [16, 8, 8]) if key else (2, [16, 8]))
    assert blocks["transformer.h.0.mlp.fc.lora_A"] == 1


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.LNTuningConfig(),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_without_a_matrix_are_refused_in_a_few_words(config: peft.PeftConfig) -> None:
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match="Use AdamW: build_optimizer has nothing to orthogonalize") as error:
        build_optimizer(model, NAMO)
    assert len(str(error.value)) < 300


def test_the_fused_projection_of_litgpt_is_divided_by_the_sizes_of_its_groups() -> None:
    sizes = {"n_layer": 1, "n_head": 4, "n_query_groups": 2, "n_embd": 16, "head_size": 4, "padded_vocab_size": 32}
    model = litgpt.GPT(litgpt.Config(**sizes))
    name = "transformer.h.0.attn.qkv.weight"
    reasons = {route.name: route.reason for route in split_parameters(model).routes}
    assert reasons[name] == "matrix, fused: 3 blocks possible"
    for words, blocks in (("auto", [16, 8, 8]), ("heads", 8)):
        groups = split_parameters(model, blocks=words)
        assert {n: g["blocks"] for g in groups for n, _ in g["params"] if g.get("blocks", 1) != 1} == {name: blocks}
