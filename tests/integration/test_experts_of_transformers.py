"""Mixtures of experts of transformers are trained as a loop over their experts, on one process and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.dbrx import modeling_dbrx as dbrx

from lightning_namo import NAMOD, build_optimizer, split_parameters
from lightning_namo.testing.layouts import gathered_weights
from tests.helpers.launch import run_ranks

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 12, "pad_token_id": 0, "max_position_embeddings": 32}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name: class of the configuration, more of it
    "mixtral": ("MixtralConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"moe_intermediate_size": 10, "head_dim": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", {"moe_intermediate_size": 10, "shared_expert_intermediate_size": 12}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "moe_intermediate_size": 10,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "olmoe": ("OlmoeConfig", {}),
    "jamba": (
        "JambaConfig",
        {
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "llama4_text": ("Llama4TextConfig", {"head_dim": 8, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 1}),
}
TURNED = ("gpt_oss", "llama4_text")  # stored with input features as rows
STEPS = 2


def made(family: str) -> nn.Module:
    name, more = FAMILIES[family]
    config = getattr(transformers, name)(**(SMALL | EXPERTS | more))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():  # some are left without numbers
        nn.init.normal_(parameter, std=0.1)
    return model.double()


def ids(step: int) -> Tensor:
    return torch.randint(1, 31, (4, 8), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()


def experts(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_trained_as_a_loop_over_matrices(family: str) -> None:
    model = made(family)
    found = experts(model)
    assert found
    routes = {route.name: route for route in split_parameters(model).routes}
    optimizer = build_optimizer(model, NAMOD, lr=0.05, orthogonalizer="svd")
    alone: dict[str, list[nn.Parameter]] = {}
    groups = []
    for name, p in found.items():
        assert routes[name].reason.startswith("4 matrices "), routes[name]
        alone[name] = [nn.Parameter(part.clone()) for part in p.detach()]
        assert ("input features as rows" in routes[name].reason) == (family in TURNED)
        groups.append({"params": alone[name], "transposed": family in TURNED})
    plain = NAMOD(groups, lr=0.05, orthogonalizer="svd")
    for step in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        for name, p in found.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            for part, of_part in zip(alone[name], grad, strict=True):
                part.grad = of_part.clone()
        optimizer.step()
        plain.step()
    for name, p in found.items():
        for part, expert in zip(alone[name], p.detach(), strict=True):
            torch.testing.assert_close(expert, part.detach(), rtol=1e-9, atol=1e-12)


def sharded(rank: int, families: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for family in families:
        model = made(family)
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == 2:
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, build_optimizer(model, NAMOD, lr=0.05, orthogonalizer="svd"))
        found[family] = gathered_weights(model)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_experts_are_trained_as_on_one_process() -> None:
    actual = run_ranks(sharded, 2, list(FAMILIES), timeout=240)[0]
    for family in FAMILIES:
        model = made(family)
        train(model, build_optimizer(model, NAMOD, lr=0.05, orthogonalizer="svd"))
        for name, weight in gathered_weights(model).items():
            torch.testing.assert_close(actual[family][name], weight, rtol=1e-7, atol=1e-9)


def test_experts_that_are_stored_in_one_matrix_are_found() -> None:
    with torch.device("meta"):
        glu = dbrx.DbrxExpertGLU(
            transformers.models.dbrx.configuration_dbrx.DbrxFFNConfig(
                hidden_size=16, ffn_hidden_size=12, moe_num_experts=4
            )
        )
    words = {route.name: route.reason for route in split_parameters(glu).routes}
    for name in ("w1", "v1", "w2"):
        features = "input" if name == "w2" else "output"
        assert words[name] == f"4 matrices 12 x 16, {features} features as rows, as DbrxExpertGLU uses them"
