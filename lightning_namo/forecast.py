"""`lightning-namo plan`: the estimate of a step for a recipe or a well-known shape, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_namo.base import OrthogonalizedOptimizer
from lightning_namo.callbacks import OptimizerCallback
from lightning_namo.estimate import Estimate, Rank, Rates, estimate
from lightning_namo.factory import build_optimizer
from lightning_namo.gpt2.data import TextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module, follow_data
from lightning_namo.grid import LAYOUTS, Grid
from lightning_namo.types import OpenUnitInterval, PositiveFloat, PositiveInt


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


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Radford et al. 2019, table 2, the vocabulary padded to 50304; 480 x 1024 tokens a step as in arXiv 2602.17080.
    "gpt2_small": (lambda: GPT2(GPT2Config(n_layer=12, n_head=12, n_embd=768)), 480 * 1024),
    "gpt2_medium": (lambda: GPT2(GPT2Config(n_layer=24, n_head=16, n_embd=1024)), 480 * 1024),
    "gpt2_large": (lambda: GPT2(GPT2Config(n_layer=36, n_head=20, n_embd=1280)), 480 * 1024),
    # Llama 2, arXiv 2307.09288 (4M tokens a step), and its params.json: hidden is 8/3 dim, for 70B times 1.3, rounded
    # up to a multiple of 256, for 70B of 4096; keys and values of 70B have 8 heads of 128.
    "llama_7b": (lambda: Llama(n_layers=32, dim=4096, hidden=11008, kv_dim=4096), 4 * 2**20),
    "llama_70b": (lambda: Llama(n_layers=80, dim=8192, hidden=28672, kv_dim=1024), 4 * 2**20),
}
"""Shapes by name: what builds them, and the tokens of an optimizer step that they were trained with."""


def plan(
    ranks: PositiveInt,
    model: Callable[[], LightningModule] | str = "gpt2_small",
    layout: str | None = None,
    replicas: PositiveInt | None = None,
    tensor: PositiveInt | None = None,
    bucket_mib: PositiveFloat = 32.0,
    link_gbytes: PositiveFloat = 50.0,
    tflops: PositiveFloat = 400.0,
    peak_tflops: PositiveFloat = 989.0,
    model_flops_utilization: OpenUnitInterval = 0.4,
    tokens_per_step: PositiveInt | None = None,
    owners: bool = False,
    json: bool = False,
    optim: OptimizerCallback | None = None,
    data: LightningDataModule | None = None,
    trainer: Callable[[], Trainer] | None = None,
    seed_everything: Any = None,
    ckpt_path: Any = None,
    weights_only: Any = None,
) -> dict[str, Any] | str:
    """Say what a step would cost on many ranks: owners, FLOPs, bytes, memory and time, computed and not measured.

    Takes the configs of `fit` in layers. The model is built without memory; no process is started.

    Args:
        ranks: Number of ranks.
        model: A LightningModule's class, as for `fit`, or gpt2_small, gpt2_medium, gpt2_large, llama_7b, llama_70b.
        layout: ddp, fsdp2, hsdp or fsdp2_tp; by default the recipe's strategy, without a recipe fsdp2.
        replicas: Copies of the sharded model, of hsdp and fsdp2_tp; by default the recipe's, or ranks / 8 for hsdp.
        tensor: Ranks that share each block, of fsdp2_tp; by default the recipe's, or 2.
        bucket_mib: MiB of matrices that a rank assembles at a time (the optimizer's bucket_bytes; runs on CPUs take 8).
            Buffers are those of the bfloat16 iteration, unless LIGHTNING_NAMO_ITERATION_DTYPE=float32 is set.
        link_gbytes: GB/s that a rank sends, and receives at the same time.
        tflops: TFLOP/s that a rank achieves in the bfloat16 iteration.
        peak_tflops: TFLOP/s of a rank at best; 989 is the H100's for dense bfloat16 matrices.
        model_flops_utilization: Share of the peak that forward and backward passes reach, in (0, 1).
        tokens_per_step: Tokens of an optimizer step on all ranks; by default the recipe's, or those that the shape was
            trained with.
        owners: Whether to list the owner of every matrix.
        json: Whether to print JSON in place of tables.
        optim: The recipe's; NAMO by default.
        data: The recipe's.
        trainer: The recipe's.
        seed_everything: Not used; recipes have it.
        ckpt_path: Not used; recipes have it.
        weights_only: Not used; recipes have it.

    Returns:
        The tables, or with `json` plain numbers.

    Raises:
        ValueError: An unknown model or layout, sizes that do not divide the ranks, a model or an optimizer without
            matrices.
    """
    title = model if isinstance(model, str) else "the recipe's model"
    built = build_model(model, data)
    settings = getattr(trainer, "keywords", {})
    layout, replicas, tensor = _sizes(built, settings, layout, replicas, tensor)
    grid = Grid.of(layout, ranks, replicas, tensor)
    _check_heads(built.module, grid)
    optimizer = make_optimizer(built.module, optim or OptimizerCallback())
    optimizer.bucket_bytes = int(bucket_mib * 2**20)
    tokens = tokens_per_step or built.tokens or _tokens(data, settings, grid)
    rates = Rates(link_gbytes, tflops, peak_tflops, model_flops_utilization)
    result = estimate(optimizer, grid, rates, tokens)
    if json:
        return result.as_dict(owners)
    lines = [report(result, f"{type(optimizer).__name__} for {title} on {ranks} ranks, {layout}", rates, tokens)]
    if owners:
        named = zip(result.plan.owners, result.matrices, strict=True)
        lines += ["", *table([("owner", "matrix", "shape"), *((f"{o}", m.name, f"{m.shape}") for o, m in named)])]
    return "\n".join(lines)


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


def build_model(model: Callable[[], LightningModule] | str, data: LightningDataModule | None = None) -> Built:
    """Build a model on the meta device.

    Args:
        model: One of `MODELS`, or what makes a LightningModule.
        data: What a GPT-2's vocabulary and block size follow, as for `fit`; by default the embedded corpus.

    Raises:
        ValueError: An unknown name.
    """
    if isinstance(model, str) and model not in MODELS:
        raise ValueError(
            f"Expected model to be a LightningModule's class or one of {', '.join(MODELS)}. Got {model!r}."
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
        module.configure_model()
    return Built(module, replicas=replicas)


def make_optimizer(module: nn.Module, callback: OptimizerCallback) -> OrthogonalizedOptimizer:
    """The optimizer that a recipe's section ``optim`` makes for a module.

    Raises:
        ValueError: If it is not one of this package, or the module has no matrices.
    """
    optimizer = build_optimizer(
        module,
        callback.optimizer,
        adamw=callback.adamw,
        orthogonalize=callback.orthogonalize,
        blocks=callback.blocks,
    )
    if not isinstance(optimizer, OrthogonalizedOptimizer):
        raise ValueError(
            f"Expected NAMO, NAMOD, Muon or AdaMuon, whose work is shared out. Got {type(optimizer).__name__}."
        )
    return optimizer


def _sizes(
    built: Built, settings: dict[str, Any], layout: str | None, replicas: int | None, tensor: int | None
) -> tuple[str, int | None, int | None]:
    """Layout, replicas and tensor-parallel ranks: as given, else as the recipe has them."""
    strategy = settings.get("strategy")
    if layout is not None or strategy is None:
        return layout or "fsdp2", replicas, tensor
    if isinstance(strategy, ModelParallelStrategy):
        parts = strategy._tensor_parallel_size
        tensor = tensor or (parts if isinstance(parts, int) and parts > 1 else None)
        replicas = replicas or (built.replicas if built.replicas > 1 else None)
        return "fsdp2_tp" if tensor else "hsdp" if replicas else "fsdp2", replicas, tensor
    if strategy in ("auto", "ddp") or isinstance(strategy, DDPStrategy):
        return "ddp", replicas, tensor
    raise ValueError(
        f"Expected a recipe with DDP or ModelParallelStrategy, or --layout ({', '.join(LAYOUTS)}). Got "
        f"{strategy if isinstance(strategy, str) else type(strategy).__name__}; with FSDP (1) bytes and memory are "
        "about those of --layout fsdp2."
    )


def _check_heads(module: nn.Module, grid: Grid) -> None:
    for part in module.modules():
        if isinstance(part, GPT2) and part.config.n_head % grid.tensor:
            raise ValueError(
                f"Expected tensor, {grid.tensor}, to divide the attention heads. Got {part.config.n_head} heads."
            )


def _tokens(data: LightningDataModule | None, settings: dict[str, Any], grid: Grid) -> int | None:
    """Tokens of a step of a recipe, where its data are a `TextDataModule`."""
    if not isinstance(data, TextDataModule):
        return None
    accumulated = settings.get("accumulate_grad_batches", 1) * grid.replicas * grid.shards
    sequences = data.global_batch_size or data.batch_size * accumulated
    return int(sequences * data.block_size)


# ---------------------------------------------------------------------- tables


def report(result: Estimate, title: str, rates: Rates, tokens: int | None = None) -> str:
    """An estimate as text: a head, and the busiest and idlest ranks."""
    grid, ranks, seconds = result.grid, result.ranks, result.overlapped_seconds
    elements = sum(math.prod(matrix.shape) for matrix in result.matrices)
    sent = [rank.sent for rank in ranks]
    idle = sum(rank.matrices == 0 for rank in ranks)
    everything = result.flops / rates.tflops / 1e12
    most = {name: max(getattr(rank, name) for rank in ranks) for name in Rank.__dataclass_fields__}
    lines = [
        f"{title}: {grid.replicas} replicas x {grid.shards} shards x {grid.tensor} tensor. Computed, not measured.",
        "",
        *table(
            [
                ("matrices", f"{len(result.matrices)}", f"{elements:.4g} of {result.elements:.4g} elements"),
                ("FLOPs", f"{result.flops:.3g}", "to orthogonalize all of them once"),
                (
                    "  busiest rank",
                    f"{result.busiest:.3g}",
                    f"{result.busiest / result.bound:.3f} of the bound max(total/R, largest) = {result.bound:.3g}",
                ),
                ("  ranks without work", f"{idle}", f"of {grid.ranks}"),
                ("sent per rank", size(sum(sent) / len(sent)), f"mean; most {size(max(sent))}"),
                ("  formula", size(result.formula), "2 (R-1)/R * elements/R * itemsize, for no replicas"),
                ("collectives", f"{result.all_to_alls + result.all_reduces}", _collectives(result)),
                ("peak buffers", size(most["buffers"]), f"of a rank, {len(result.plan.buckets)} buckets"),
                ("parameters", size(most["parameters"]), "of a rank, as much again for gradients"),
                ("optimizer state", size(most["state"]), f"of a rank; AdamW for all: {size(most['adamw_state'])}"),
                (
                    "compute",
                    span(result.compute_seconds),
                    f"at {rates.tflops:g} TFLOP/s; all on each rank {span(everything)}",
                ),
                ("communication", span(result.communication_seconds), f"at {rates.link_gbytes:g} GB/s, no latency"),
                (
                    "step",
                    span(seconds),
                    f"overlapped; {span(result.compute_seconds + result.communication_seconds)} if not",
                ),
                *_share(result, rates, tokens),
            ]
        ),
        "",
        *_extremes(ranks),
    ]
    return "\n".join(lines)


def _collectives(result: Estimate) -> str:
    return f"{result.all_to_alls} all-to-alls, {result.all_reduces} all-reduces of together {size(result.reduced)}"


def _share(result: Estimate, rates: Rates, tokens: int | None) -> list[tuple[str, str, str]]:
    if result.training_seconds is None or result.overhead is None:
        return [("share of training", "unknown", "give --tokens_per_step")]
    passes = (
        f"passes {span(result.training_seconds)} ({tokens:,} tokens at {rates.model_flops_utilization:.0%} of peak)"
    )
    return [("share of training", f"{result.overhead:.2%}", passes)]


def _extremes(ranks: Sequence[Rank], count: int = 3) -> list[str]:
    order = sorted(range(len(ranks)), key=lambda rank: (-ranks[rank].flops, rank))
    shown = order if len(order) <= 2 * count else [*order[:count], *order[-count:]]
    head = ("rank", "matrices", "FLOPs", "sent", "received", "peak buffers", "parameters", "state")
    rows = []
    for number in shown:
        rank = ranks[number]
        sizes = (rank.sent, rank.received, rank.buffers, rank.parameters, rank.state)
        rows.append((f"{number}", f"{rank.matrices}", f"{rank.flops:.3g}", *map(size, sizes)))
    note = [] if len(shown) == len(order) else [f"the {count} busiest ranks and the {count} idlest"]
    return [*note, *table([head, *rows])]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(number: float) -> str:
    """Bytes in words: 1.50 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def span(seconds: float) -> str:
    """Seconds in words: 1.50 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
