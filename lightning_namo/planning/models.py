"""Models on the meta device whose step is planned: recipes', and well-known shapes by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module, follow_data
from lightning_namo.integration.build import build_optimizer
from lightning_namo.integration.optimizer_callback import OptimizerCallback
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.planning.simulated_mesh import SimulatedMesh


class Llama(nn.Module):
    """The parameters of a Llama (Touvron et al. 2023) by the names of Meta's checkpoints; it computes nothing.

    Args:
        n_layers: Transformer blocks.
        dim: Channels.
        hidden: Channels within the feed-forward layers.
        kv_dim: Channels of the keys and of the values (grouped-query attention).
        vocab_size: Tokens in the vocabulary.
    """

    def __init__(self, n_layers: int, dim: int, hidden: int, kv_dim: int, vocab_size: int = 32000) -> None:
        super().__init__()
        attention = {"wq": (dim, dim), "wk": (dim, kv_dim), "wv": (dim, kv_dim), "wo": (dim, dim)}
        feed_forward = {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            layer: dict[str, nn.Module] = {"attention_norm": nn.RMSNorm(dim), "ffn_norm": nn.RMSNorm(dim)}
            for name, sizes in (("attention", attention), ("feed_forward", feed_forward)):
                layer[name] = nn.ModuleDict({k: nn.Linear(*size, bias=False) for k, size in sizes.items()})
            self.layers.append(nn.ModuleDict(layer))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)


class Experts(nn.Module):
    """The parameters of a mixture of experts' feed-forward layer as transformers keeps them; it computes nothing.

    Args:
        count: Experts.
        dim: Channels.
        hidden: Channels within each expert.
    """

    is_transposed = False

    def __init__(self, count: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(count, dim, hidden))


class MixtureOfExperts(nn.Module):
    """The parameters of a language model with a mixture of experts in each block, after some dense ones.

    Args:
        n_layers: Transformer blocks.
        dim: Channels.
        attention: Rows and columns of the attention's matrices, by name.
        experts: Experts in a block, beside those that see every token.
        hidden: Channels within each expert.
        shared: Channels within the experts that see every token; 0: there are none.
        dense: Blocks with a feed-forward layer in place of experts, and the channels within it.
        vocab_size: Tokens in the vocabulary.
    """

    def __init__(
        self,
        n_layers: int,
        dim: int,
        attention: dict[str, tuple[int, int]],
        experts: int,
        hidden: int,
        vocab_size: int,
        shared: int = 0,
        dense: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()

        def feed_forward(hidden: int) -> nn.Module:
            sizes = {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
            return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList()
        for number in range(n_layers):
            projections = {name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in attention.items()}
            layer: dict[str, nn.Module] = {"attention": nn.ModuleDict(projections)}
            if number < dense[0]:
                layer["feed_forward"] = feed_forward(dense[1])
            else:
                layer["experts"] = Experts(experts, dim, hidden)
                if shared:
                    layer["feed_forward"] = feed_forward(shared)
            self.layers.append(nn.ModuleDict(layer))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)


def _mixtral() -> nn.Module:
    dim, kv_dim = 4096, 1024
    attention = {"wq": (dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, dim)}
    return MixtureOfExperts(32, dim, attention, experts=8, hidden=14336, vocab_size=32000)


def _deepseek_v3() -> nn.Module:
    dim, heads = 7168, 128
    attention = {"q_a": (1536, dim), "q_b": (heads * 192, 1536), "kv_a": (576, dim), "kv_b": (heads * 256, 512)}
    attention["o"] = (dim, heads * 128)
    return MixtureOfExperts(61, dim, attention, 256, 2048, vocab_size=129280, shared=2048, dense=(3, 18432))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Radford et al. 2019, table 2, the vocabulary padded to 50304; 480 x 1024 tokens a step as in arXiv 2602.17080.
    "gpt2_small": (lambda: GPT2(GPT2Config(n_layer=12, n_head=12, n_embd=768)), 480 * 1024),
    "gpt2_medium": (lambda: GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024)), 480 * 1024),
    "gpt2_large": (lambda: GPT2(GPT2Config(n_layer=36, n_head=20, n_embd=1280)), 480 * 1024),
    # Llama 2, arXiv 2307.09288 (4M tokens a step), and its params.json: hidden is 8/3 dim, for 70B times 1.3, rounded
    # up to a multiple of 256, for 70B of 4096; keys and values of 70B have 8 heads of 128.
    "llama_7b": (lambda: Llama(n_layers=32, dim=4096, hidden=11008, kv_dim=4096), 4 * 2**20),
    "llama_70b": (lambda: Llama(n_layers=80, dim=8192, hidden=28672, kv_dim=1024), 4 * 2**20),
    # arXiv 2401.04088, table 1 (the batch, not published, is Llama's); arXiv 2412.19437, section 4.2. Without routers.
    "mixtral_8x7b": (_mixtral, 4 * 2**20),
    "deepseek_v3": (_deepseek_v3, 15360 * 4096),
}
"""Shapes by name: what builds them, and the tokens of an optimizer step that they were trained with."""


class Built(NamedTuple):
    """A model on the meta device.

    Args:
        module: The model, whole.
        tokens: Of an optimizer step, where it is a model by name.
        replicas: That the recipe asks for.
    """

    module: nn.Module
    tokens: int | None = None
    replicas: int = 1


def build_model(model: Callable[[], nn.Module] | str, data: LightningDataModule | None = None) -> Built:
    """Build a model on the meta device.

    Args:
        model: One of `MODELS`, or what makes a module.
        data: What a GPT-2's vocabulary and block size follow, as for `fit`; by default the embedded corpus.

    Raises:
        ValueError: An unknown name.
    """
    if isinstance(model, str) and model not in MODELS:
        nearest = difflib.get_close_matches(model, MODELS, n=1)
        raise ValueError(
            f"Expected model to be a LightningModule's class, such as my_package.MyModule, or one of "
            f"{', '.join(MODELS)}. Got {model!r}.{f' Nearest: {nearest[0]}.' if nearest else ''}"
        )
    with torch.device("meta"):
        if isinstance(model, str):
            make, tokens = MODELS[model]
            return Built(make(), tokens)
        module, replicas = model(), 1
        if isinstance(module, GPT2Module):
            text = data or TextDataModule()
            if isinstance(text, TextDataModule):
                module.config = follow_data(module.config, text)
            replicas, module.replicas = module.replicas, 1  # there is no mesh here to shard over
        if isinstance(module, LightningModule):
            module.configure_model()
    return Built(module, replicas=replicas)


def recipe_optimizer(module: nn.Module, callback: OptimizerCallback) -> OrthogonalizedOptimizer:
    """The optimizer that a recipe's section ``optim`` makes for a module.

    Raises:
        ValueError: If it is not one of this package, or the module has no matrices.
    """
    optimizer = build_optimizer(module, callback.optimizer, **callback.routing)
    if not isinstance(optimizer, OrthogonalizedOptimizer):
        raise ValueError(
            f"Expected a subclass of OrthogonalizedOptimizer, as NAMO, whose work is shared out. Got "
            f"{type(optimizer).__name__}. Name it: --optim.optimizer NAMO."
        )
    return optimizer


def check_heads(module: nn.Module, mesh: SimulatedMesh) -> None:
    """Raise a ValueError if tensor-parallel ranks do not divide the heads of a GPT-2."""
    for part in module.modules():
        if isinstance(part, GPT2) and part.config.n_head % mesh.tensor:
            raise ValueError(
                f"Expected tensor, {mesh.tensor}, to divide the attention heads. Got {part.config.n_head} heads."
            )
