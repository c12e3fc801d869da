"""What a step does beside taking time: FLOPs, operations, bytes, collectives and peak memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

MEASURES = ("GFLOP", "operations", "GB touched", "MB sent", "collectives", "peak MB")


def measure(step: Callable[[], object]) -> dict[str, float]:
    """The `MEASURES` of a step, each of the rank that has most of it; code that was compiled runs eagerly meanwhile."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    theirs = FlopCounterMode(display=False) if ranks == 1 else CommDebugMode()  # torch's own counts of what they can
    with torch.compiler.set_stance("force_eager"), theirs, Tally(rank, ranks) as tally:
        step()
    if isinstance(theirs, FlopCounterMode):
        assert theirs.get_total_flops() == tally.flops
    else:
        assert theirs.get_total_counts() == tally.collectives
    own = (tally.flops / 1e9, tally.operations, tally.touched / 1e9, tally.sent / 1e6, tally.collectives)
    gathered: list[Any] = [(*own, peak_bytes(step) / 1e6)] * ranks
    if ranks > 1:
        dist.all_gather_object(gathered, gathered[0])
    return dict(zip(MEASURES, map(max, zip(*gathered, strict=True)), strict=True))


class Tally(TorchDispatchMode):
    """Counts what this rank does within the context, on local tensors.

    Attributes:
        flops: Of matrix products.
        operations: Calls of PyTorch's operators.
        touched: Bytes of the tensors that operations take and give, without those of views and allocations.
        sent: Bytes that this rank sends; all-gathers, all-reduces and reduce-scatters counted as rings.
        collectives: Calls.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.flops = self.operations = self.touched = self.collectives = 0
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation; tensors that wrap others come again with what they wrap."""
        if DTensor in types or AsyncCollectiveTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations += 1
        if not func.is_view and "empty" not in func.__name__:
            self.touched += tensor_bytes((args, kwargs, out))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(
            ("wait", "_wrap", "barrier")
        ):
            self.collectives += 1
            self.sent += self._sent(func, args)
        return out

    def _sent(self, func: Any, args: Any) -> float:
        name, in_place = func.__name__.replace("_", ""), func.namespace == "c10d"
        source = args[1] if in_place and "allreduce" not in name else args[0]
        size, others = tensor_bytes(source), self.ranks - 1
        if "allreduce" in name:
            return size * 2 * others / self.ranks
        if "allgather" in name:
            return size * others
        if "reducescatter" in name:
            return size * others / self.ranks
        if "alltoall" not in name:
            raise ValueError(f"Expected a collective whose bytes are known. Got {func}: say here what it sends.")
        if isinstance(source, list):
            return size - tensor_bytes(source[self.rank])
        splits = args[4 if in_place else 2]
        return size * (1 - splits[self.rank] / max(sum(splits), 1)) if splits else size * others / self.ranks


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested lists and dicts."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_bytes(step: Callable[[], object]) -> int:
    """Highest sum of live allocations within a step, above what was live before it."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step()
        return torch.accelerator.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it announces each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
