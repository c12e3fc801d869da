"""GPT-2 (Radford et al. 2019), compact, with the parameter names of nanoGPT's checkpoints.

Shapes: B sequences, T tokens in each, C = `n_embd` channels, V = `vocab_size` tokens in the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02
"""Standard deviation of GPT-2's initial weights."""


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; by default GPT-2 small (124M), the vocabulary padded to a multiple of 64.

    Args:
        vocab_size: Tokens in the vocabulary, V.
        block_size: The longest sequence, in tokens.
        n_layer: Transformer blocks.
        n_head: Attention heads in each block; divides `n_embd`.
        n_embd: Channels, C.
        bias: Whether linear layers and layer norms have a bias (OpenAI's weights do).
        dropout: Probability of dropping an activation in training, in [0, 1).

    Raises:
        ValueError: A size below 1, a dropout outside [0, 1), or heads that do not divide the channels.
    """

    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1. Got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"Expected dropout in [0, 1). Got {self.dropout}.")
        if self.n_embd % self.n_head:
            raise ValueError(f"Expected n_embd to be a multiple of n_head. Got {self.n_embd} and {self.n_head}.")

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of the 2 `n_layer` projections that add to the residual stream."""
        return INIT_STD / math.sqrt(2 * self.n_layer)


class _Linear(nn.Linear):
    """A linear layer with GPT-2's initial scale, also when a model on the meta device is filled in."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Embedding(nn.Embedding):
    """An embedding with GPT-2's initial scale, likewise."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C = config.n_embd
        self.head_size = C // config.n_head
        self.dropout = config.dropout
        self.c_attn: nn.Linear = _Linear(C, 3 * C, bias=config.bias)
        self.c_proj = _Linear(C, C, bias=config.bias, std=config.residual_std)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        # The number of heads is left to -1: tensor parallelism keeps a part of them on each rank.
        q, k, v = (  # each (B, heads, T, head_size)
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = self.c_proj(y.transpose(1, 2).flatten(-2))
        return self.resid_dropout(y)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = _Linear(C, 4 * C, bias=config.bias)
        self.c_proj = _Linear(4 * C, C, bias=config.bias, std=config.residual_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block with norms before attention and MLP: the unit to compile, checkpoint or shard.

    Args:
        config: The shape.
        activation_checkpointing: Whether to keep only the input for the backward pass, and compute the rest again.
    """

    def __init__(self, config: GPT2Config, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        # In here and not around the block: names stay, and the hooks of FSDP run once in each direction.
        if self.activation_checkpointing:
            return checkpoint(self._layers, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """GPT-2 with the output head tied to the token embedding.

    Initialization is GPT-2's: weights N(0, 0.02²), the projections into the residual stream N(0, 0.02² / (2
    `n_layer`)), biases 0, norms 1 (Radford et al. 2019, section 2.3). Position embeddings get 0.02 as in
    nanoGPT, where OpenAI has 0.01.

    Args:
        config: The shape.
        activation_checkpointing: Whether blocks keep only their inputs for the backward pass.
    """

    def __init__(self, config: GPT2Config, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        wte = _Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": _Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(
                    Block(config, activation_checkpointing=activation_checkpointing) for _ in range(config.n_layer)
                ),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = _Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        """Compute the logits of every next token.

        Args:
            idx: Token ids, `(B, T)` with T up to `block_size`.

        Returns:
            Logits, `(B, T, V)`.

        Raises:
            ValueError: More tokens than `block_size`.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"Expected at most block_size={self.config.block_size} tokens. Got {length}.")
        net = self.transformer
        x = net["wte"](idx) + net["wpe"](torch.arange(length, device=idx.device))  # (B, T, C)
        x = net["drop"](x)
        for block in net["h"].children():
            x = block(x)
        return self.lm_head(net["ln_f"](x))  # type: ignore[no-any-return]


@torch.no_grad()
def sample(
    forward: Callable[[Tensor], Tensor],
    idx: Tensor,
    max_new_tokens: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a continuation, token by token, from what computes logits: a `GPT2` or a strategy's wrapper.

    Args:
        forward: Maps ids `(B, T)` to logits `(B, T, V)`; it sees the last `block_size` tokens.
        idx: Token ids to continue, `(B, T)` with T of at least 1.
        max_new_tokens: Tokens to add, N.
        block_size: The longest sequence that `forward` takes, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens only.
        generator: Source of randomness, on the device of `idx`; torch's own if None.

    Returns:
        The ids with their continuation, `(B, T + N)`.

    Raises:
        ValueError: No token to start from, a negative temperature, or a top_k below 1.
    """
    if idx.ndim != 2 or idx.shape[1] < 1:
        raise ValueError(f"Expected token ids (B, T) with at least one token. Got shape {tuple(idx.shape)}.")
    if temperature < 0:
        raise ValueError(f"Expected temperature of at least 0. Got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"Expected top_k of at least 1, or None. Got {top_k}.")
    for _ in range(max_new_tokens):
        logits = forward(idx[:, -block_size:])[:, -1].float()  # (B, V)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        idx = torch.cat((idx, token), dim=1)
    return idx
