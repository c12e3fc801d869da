"""`lightning-namo plan`: the estimate of a step for a recipe or a well-known shape, as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_namo.arguments import COUNT, OPEN_UNIT, POSITIVE, check_ranges, or_none
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.integration.optimizer_callback import OptimizerCallback
from lightning_namo.planning.cost_model import Estimate, Rank, Rates, estimate
from lightning_namo.planning.models import Built, build_model, check_heads, recipe_optimizer
from lightning_namo.planning.simulated_mesh import LAYOUTS, SimulatedMesh

_RANGES = {
    "ranks": COUNT,
    **dict.fromkeys(("replicas", "tensor", "tokens_per_step"), or_none(COUNT)),
    "bucket_mib": or_none(POSITIVE),
    **dict.fromkeys(("link_gbytes", "tflops", "peak_tflops"), POSITIVE),
    "model_flops_utilization": OPEN_UNIT,
}


def plan(
    ranks: int,
    model: Callable[[], LightningModule] | str = "gpt2_small",
    layout: str | None = None,
    replicas: int | None = None,
    tensor: int | None = None,
    bucket_mib: float | None = None,
    link_gbytes: float = 50.0,
    tflops: float = 400.0,
    peak_tflops: float = 989.0,
    model_flops_utilization: float = 0.4,
    tokens_per_step: int | None = None,
    owners: bool = False,
    json: bool = False,
    optim: OptimizerCallback | None = None,
    data: LightningDataModule | None = None,
    trainer: Callable[[], Trainer] | None = None,
) -> dict[str, Any] | str:
    """Say what a step would cost on many ranks: owners, FLOPs, bytes, memory and time, computed and not measured.

    Takes the configs of `fit` in layers. The model is built without memory; no process is started.

    Args:
        ranks: Number of ranks.
        model: A LightningModule's class, as for `fit`, or gpt2_small, gpt2_medium, gpt2_large, llama_7b, llama_70b,
            mixtral_8x7b, deepseek_v3.
        layout: ddp, fsdp2, hsdp or fsdp2_tp; by default the recipe's strategy, without a recipe fsdp2.
        replicas: Copies of the sharded model, of hsdp and fsdp2_tp; by default the recipe's, or ranks / 8 for hsdp.
        tensor: Ranks that share each block, of fsdp2_tp; by default the recipe's, or 2.
        bucket_mib: MiB of matrices that a rank assembles at a time (the optimizer's bucket_bytes); by default 320, as
            on accelerators of 80 GiB. Runs on CPUs take 8. Buffers are those of the bfloat16 iteration, unless
            LIGHTNING_NAMO_ITERATION_DTYPE=float32 is set.
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

    Returns:
        The tables, or with `json` plain numbers.

    Raises:
        ValueError: Numbers out of range, an unknown model or layout, sizes that do not divide the ranks, a model or an
            optimizer without matrices.
    """
    check_ranges(locals(), "plan", _RANGES)
    title = model if isinstance(model, str) else "the recipe's model"
    built = build_model(model, data)
    settings = getattr(trainer, "keywords", {})
    layout, replicas, tensor = _sizes(built, settings, layout, replicas, tensor)
    mesh = SimulatedMesh.of(layout, ranks, replicas, tensor)
    check_heads(built.module, mesh)
    optimizer = recipe_optimizer(built.module, optim or OptimizerCallback())
    optimizer.bucket_bytes = None if bucket_mib is None else int(bucket_mib * 2**20)
    tokens = tokens_per_step or built.tokens or _tokens(data, settings, mesh)
    rates = Rates(link_gbytes, tflops, peak_tflops, model_flops_utilization)
    result = estimate(optimizer, mesh, rates, tokens)
    if json:
        return result.as_dict(owners)
    lines = [report(result, f"{type(optimizer).__name__} for {title} on {ranks} ranks, {layout}", rates, tokens)]
    if owners:
        named = zip(result.assignment.owners, result.matrices, strict=True)
        lines += ["", *table([("owner", "matrix", "shape"), *((f"{o}", m.name, f"{m.shape}") for o, m in named)])]
    return "\n".join(lines)


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


def _tokens(data: LightningDataModule | None, settings: dict[str, Any], mesh: SimulatedMesh) -> int | None:
    """Tokens of a step of a recipe, where its data are a `TextDataModule`."""
    if not isinstance(data, TextDataModule):
        return None
    accumulated = settings.get("accumulate_grad_batches", 1) * mesh.replicas * mesh.shards
    sequences = data.global_batch_size or data.batch_size * accumulated
    return int(sequences * data.block_size)


def report(result: Estimate, title: str, rates: Rates, tokens: int | None = None) -> str:
    """An estimate as text: a head, and the busiest and idlest ranks."""
    mesh, ranks, seconds = result.mesh, result.ranks, result.overlapped_seconds
    elements = sum(math.prod(matrix.shape) for matrix in result.matrices)
    sent = [rank.sent for rank in ranks]
    idle = sum(rank.matrices == 0 for rank in ranks)
    everything = result.flops / rates.tflops / 1e12
    most = {name: max(getattr(rank, name) for rank in ranks) for name in Rank.__dataclass_fields__}
    lines = [
        f"{title}: {mesh.replicas} replicas x {mesh.shards} shards x {mesh.tensor} tensor. Computed, not measured.",
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
                ("  ranks without work", f"{idle}", f"of {mesh.ranks}"),
                ("sent per rank", format_bytes(sum(sent) / len(sent)), f"mean; most {format_bytes(max(sent))}"),
                ("  formula", format_bytes(result.formula), "2 (R-1)/R * elements/R * itemsize, for no replicas"),
                ("collectives", f"{result.all_to_alls + result.all_reduces}", _collectives(result)),
                ("peak buffers", format_bytes(most["buffers"]), f"of a rank, {len(result.assignment.buckets)} buckets"),
                ("parameters", format_bytes(most["parameters"]), "of a rank, as much again for gradients"),
                (
                    "optimizer state",
                    format_bytes(most["state"]),
                    f"of a rank; AdamW for all: {format_bytes(most['adamw_state'])}",
                ),
                (
                    "compute",
                    format_seconds(result.compute_seconds),
                    f"at {rates.tflops:g} TFLOP/s; all on each rank {format_seconds(everything)}",
                ),
                (
                    "communication",
                    format_seconds(result.communication_seconds),
                    f"at {rates.link_gbytes:g} GB/s, no latency",
                ),
                (
                    "step",
                    format_seconds(seconds),
                    f"overlapped; {format_seconds(result.compute_seconds + result.communication_seconds)} if not",
                ),
                *_share(result, rates, tokens),
            ]
        ),
        "",
        *_extremes(ranks),
    ]
    return "\n".join(lines)


def _collectives(result: Estimate) -> str:
    return (
        f"{result.all_to_alls} all-to-alls, {result.all_reduces} all-reduces of together {format_bytes(result.reduced)}"
    )


def _share(result: Estimate, rates: Rates, tokens: int | None) -> list[tuple[str, str, str]]:
    if result.training_seconds is None or result.overhead is None:
        return [("share of training", "unknown", "give --tokens_per_step")]
    share = f"{tokens:,} tokens at {rates.model_flops_utilization:.0%} of peak"
    passes = f"passes {format_seconds(result.training_seconds)} ({share})"
    return [("share of training", f"{result.overhead:.2%}", passes)]


def _extremes(ranks: Sequence[Rank], count: int = 3) -> list[str]:
    order = sorted(range(len(ranks)), key=lambda rank: (-ranks[rank].flops, rank))
    shown = order if len(order) <= 2 * count else [*order[:count], *order[-count:]]
    head = ("rank", "matrices", "FLOPs", "sent", "received", "peak buffers", "parameters", "state")
    rows = []
    for number in shown:
        rank = ranks[number]
        sizes = (rank.sent, rank.received, rank.buffers, rank.parameters, rank.state)
        rows.append((f"{number}", f"{rank.matrices}", f"{rank.flops:.3g}", *map(format_bytes, sizes)))
    note = [] if len(shown) == len(order) else [f"the {count} busiest ranks and the {count} idlest"]
    return [*note, *table([head, *rows])]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_bytes(number: float) -> str:
    """Bytes in words: 1.50 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def format_seconds(seconds: float) -> str:
    """Seconds in words: 1.50 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
