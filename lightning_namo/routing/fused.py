"""Matrices that are stacked by rows in one parameter: fused projections, and the low-rank adapters of those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from lightning_namo.routing.candidates import Candidate, Use
from lightning_namo.routing.layers import Tree, class_words, is_layer, is_lora, role_path
from lightning_namo.routing.names import words

QKV = {"c_attn", "qkv", "to_qkv", "qkv_proj", "wqkv", "in_proj_weight"}
_INTERLEAVED = {"query_key_value"}  # q, k and v of one head after those of another, as in BLOOM, GPT-NeoX, Falcon
_INTERLEAVED_CLASSES = {"CodeGenAttention", "MiniMaxLightningAttention"}
UNFUSED = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "to_q", "to_k", "to_v", "wq", "wk", "wv"}
UNFUSED |= {"q_proj_weight", "k_proj_weight", "v_proj_weight", "q_lin", "k_lin", "v_lin", "q", "k", "v"}
_GATED = {"gate_up_proj", "gate_up", "w12", "w13"}
_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_query_groups", "n_kv_heads", "kv_heads")
_HEAD_SIZE = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "d_head", "size_per_head")


HEAD_BY_HEAD = "q, k and v, head by head"


class Fused(NamedTuple):
    """What is known of the rows (output features) of a matrix.

    Attributes:
        sizes: Rows of each of the matrices in it; one: it is not fused, or how is not known.
        head: Rows of each attention head; 0: it has none, or they are not known.
        parts: What the matrices are, for the table.
    """

    sizes: list[int]
    head: int = 0
    parts: str = ""


def find_fused(candidate: Candidate, tree: Tree) -> Fused:
    """How the rows of a matrix divide into matrices of their own, by its class, its name and its module's sizes."""
    use, rows = candidate.uses[0], candidate.rows
    nothing = Fused([rows])
    is_lora_a = is_lora(use.path, use.label) and not any("b" in words(part) for part in use.path[-2:])
    if candidate.batched or not is_layer(use.owner) or is_lora_a:
        return nothing
    if isinstance(use.owner, nn.RNNBase | nn.RNNCellBase):
        gates = 4 if isinstance(use.owner, nn.LSTM | nn.LSTMCell) else 3 if "GRU" in type(use.owner).__name__ else 1
        is_gates = gates > 1 and "_hr" not in use.label and rows % gates == 0
        return Fused([rows // gates] * gates, parts="gates") if is_gates else nothing
    path = role_path(use.path)
    inside = isinstance(use.owner, nn.MultiheadAttention)
    name = use.label if inside else path[-1] if path else ""
    holder = use.owner if inside else _holder(use, tree)
    columns = candidate.stored[1 - candidate.transposed]
    for fused in (_attention(name.lower(), rows, columns, holder), _others(name, rows, holder)):
        if fused is not None:
            return fused
    return nothing


def _holder(use: Use, tree: Tree) -> nn.Module:
    """The module that a layer belongs to, not one that peft or a LoRA class puts in between."""
    path = use.path
    for end in range(len(path) - 1, -1, -1):
        if role_path(path[:end]) != role_path(path):
            return tree.modules[path[:end]]
    return tree.root


def _attention(name: str, rows: int, columns: int, holder: nn.Module) -> Fused | None:
    if name not in QKV | _INTERLEAVED | UNFUSED:
        return None
    heads, groups, size = (_number(holder, names) for names in (_HEADS, _KV_HEADS, _HEAD_SIZE))
    if name in UNFUSED:
        count = heads if name[0] == "q" or name.endswith("q") else groups or heads
        size = size or (rows // count if count else 0)
        return Fused([rows], size if size and rows % size == 0 and rows > size else 0, "heads")
    size = size or (columns // heads if heads else 0)
    size = size if size and rows % size == 0 else 0
    if name in _INTERLEAVED or _is_interleaved(holder):
        return Fused([rows], size, HEAD_BY_HEAD)
    groups = groups or heads
    if heads and size and rows == (heads + 2 * groups) * size:
        return Fused([heads * size, groups * size, groups * size], size, "q, k and v")
    if name == "c_attn" and rows == 2 * columns:  # of GPT-2's cross-attention
        return Fused([rows // 2] * 2, size, "k and v")
    return Fused([rows // 3] * 3, size, "q, k and v") if rows == 3 * columns else None


def _is_interleaved(holder: nn.Module) -> bool:
    """Whether an attention stores q, k and v head by head: by its class or attributes, as the name does not say so."""
    names = [(cls.__module__, cls.__name__) for cls in type(holder).__mro__]
    if any(name in _INTERLEAVED_CLASSES or module == "timm.models.tiny_vit" for module, name in names):
        return True
    is_bigcode = any(name == "GPTBigCodeAttention" for _, name in names)
    legacy = any("Legacy" in type(child).__name__ for child in holder.children())  # guided diffusion's
    return (
        (is_bigcode and not getattr(holder, "multi_query", True))
        or legacy
        or getattr(holder, "head_first", False) is True
    )


def _others(name: str, rows: int, holder: nn.Module) -> Fused | None:
    if name == "in_proj_qkv":  # of Qwen's linear attention
        key, value = (_number(holder, (n,)) for n in ("key_dim", "value_dim"))
        is_known = key > 0 and value > 0 and 2 * key + value == rows
        return Fused([key, key, value], parts="q, k and v") if is_known else None
    if name in _GATED and rows % 2 == 0:
        return Fused([rows // 2] * 2, parts="gate and up")
    is_state_space = {"mamba", "mamba2", "ssm"} & class_words(holder) or any(
        "a_log" in label.lower() for label, _ in holder.named_parameters(recurse=False)
    )
    in_pairs = any(cls.__name__ == "ZambaMambaMixer" for cls in type(holder).__mro__)
    if name != "in_proj" or not is_state_space or in_pairs:
        return None
    inner, conv, heads = (_number(holder, (n,)) for n in ("intermediate_size", "conv_dim", "num_heads"))
    inner = inner or _number(holder, ("d_inner",))
    if inner and rows == 2 * inner:
        return Fused([inner, inner], parts="states and gate")
    sizes = [inner, conv, heads]  # of Mamba 2: gate; states, B and C; step sizes
    return Fused(sizes, parts="gate, states and step sizes") if min(sizes) and sum(sizes) == rows else None


def _number(holder: nn.Module, names: Iterable[str]) -> int:
    """The first of the attributes that the module or its configuration has as a whole number; 0: none."""
    for source in (holder, getattr(holder, "config", None)):
        for name in names:
            try:
                value: Any = getattr(source, name, None)
            except (AttributeError, RuntimeError):  # configurations whose layers differ have no one number
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def blocks_of(fused: Fused, by_head: bool) -> int | list[int]:
    """The blocks that `blocks="auto"`, or "heads", takes: 1 where nothing is known."""
    rows = sum(fused.sizes)
    if by_head and fused.head and rows > fused.head:
        return rows // fused.head
    if len(fused.sizes) == 1:
        return 1
    return len(fused.sizes) if len(set(fused.sizes)) == 1 else fused.sizes


def possible(fused: Fused) -> str | None:
    """What a reader of the table should know of a matrix that could be divided; None: it could not."""
    blocks = blocks_of(fused, by_head=False)
    if blocks != 1:
        return f"fused: {blocks if isinstance(blocks, int) else len(blocks)} blocks possible"
    by_head = fused.parts == HEAD_BY_HEAD and fused.head
    return f"fused: {sum(fused.sizes) // fused.head} blocks possible, by heads" if by_head else None


def adapter_blocks(candidate: Candidate) -> int | list[int]:
    """Blocks of the A or B of litgpt's LoRA of a fused projection: three pairs, or two where one is left out."""
    (_, label, owner, _) = candidate.uses[0]
    sizes = getattr(owner, "qkv_shapes", None)
    if label not in ("lora_A", "lora_B") or not isinstance(sizes, list) or len(sizes) < 2:
        return 1
    if label == "lora_A":
        return len(sizes) if candidate.rows % len(sizes) == 0 else 1
    equal = len(set(sizes)) == 1
    return (len(sizes) if equal else list(sizes)) if sum(sizes) == candidate.rows else 1
