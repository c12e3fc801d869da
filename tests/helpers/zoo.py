"""Modules of every kind whose parameters are to be split, and what is read off the groups."""

from collections.abc import Callable

import pytest
import torch
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_namo.routing.split import ParameterGroups


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
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, 8))
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
    model = nn.ModuleDict({"backbone": GPT(), "hidden": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
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
