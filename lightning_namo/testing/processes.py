"""A rule in real processes, under every layout that they can make."""

from __future__ import annotations

import gc
import itertools
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from lightning_namo.integration.build import build_optimizer
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.testing.differences import differences
from lightning_namo.testing.layouts import (
    LAYOUTS,
    Odd,
    gathered_state,
    gathered_weights,
    new_module,
    prescribed_gradients,
)

_STEPS = 3
Trained = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]  # weights by name, states of matrices by name and key


def check_layouts(
    cls: Callable[..., OrthogonalizedOptimizer], name: str, processes: int, tolerance: float, timeout: float = 300
) -> None:
    """Train under every layout in that many processes, and compare with this one.

    Args:
        cls: The class or a partial of it, which other processes must be able to import.
        name: Of the class, for messages.
        processes: 2 to 4.
        tolerance: Relative.
        timeout: Seconds until processes that still run count as hanging.

    Raises:
        AssertionError: With the layout and what differs there, the error of a process, or that they hang.
        ValueError: For another number of processes, or a class that cannot be imported elsewhere.
    """
    if processes not in (2, 3, 4):
        raise ValueError(f"Expected 2 to 4 processes but got {processes}.")
    try:
        pickle.dumps(cls)
    except (AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"Expected a class that other processes can import, for processes={processes}, but {name} cannot "
            f"be imported: {error}. Define it at the top of a module."
        ) from error
    expected = {kind.__name__: _train(cls, new_module(kind, torch.float64), kind) for kind in _kinds()}
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(  # type: ignore[no-untyped-call]
            _rank, (processes, folder, cls, expected, tolerance), processes, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(max(deadline - time.monotonic(), 0.1)):
                if time.monotonic() > deadline:
                    raise AssertionError(
                        f"{name}: {processes} processes have not ended after {timeout:.0f} seconds. All ranks must ask "
                        "for the same in every step: let it depend on hyper-parameters and shapes alone."
                    )
        except ProcessException as error:
            raise AssertionError(f"{name} fails in {processes} processes: {error}") from error
        finally:
            for process in context.processes:
                process.kill()
        found = torch.load(Path(folder, "found.pt"), weights_only=True)
    if found:
        raise AssertionError(f"{name}: a matrix is not trained {found[0]}")


def _kinds() -> set[type[Odd]]:
    return {kind for kind, _ in LAYOUTS.values()}


def _train(
    cls: Callable[..., OrthogonalizedOptimizer], module: nn.Module, kind: type[Odd], batched: bool | None = None
) -> Trained:
    optimizer = build_optimizer(
        module, cls, blocks=kind.blocks, heads="matrix", first_layers="matrix", orthogonalizer="svd"
    )
    optimizer.bucket_bytes, optimizer.batched = 1500, batched  # several buckets, so that they overlap
    grads = [prescribed_gradients(new_module(kind, torch.float64), step) for step in range(_STEPS)]
    for of_step in grads:
        optimizer.zero_grad()
        module(of_step).backward()
        optimizer.step()
    return gathered_weights(module), gathered_state(optimizer)


def _rank(
    rank: int,
    processes: int,
    folder: str,
    cls: Callable[..., OrthogonalizedOptimizer],
    expected: dict[str, Trained],
    tolerance: float,
) -> None:
    """What each process does; the first one tells what they found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), rank=rank, world_size=processes)
    found = []
    for (layout, (kind, wrap)), batched in itertools.product(LAYOUTS.items(), (None, True)):
        plain = new_module(kind, torch.float64)
        start = {name: p.detach().clone() for name, p in plain.named_parameters()}
        weights, states = _train(cls, wrap(plain), kind, batched)
        wanted, wanted_states = expected[kind.__name__]
        for name in states:
            ours, theirs = ({"weight": w[name], **s[name]} for w, s in ((weights, states), (wanted, wanted_states)))
            if words := differences([ours], [theirs], [start[name]], tolerance):
                path = " (as on accelerators)" if batched else ""
                found.append(
                    f"under {layout} in {processes} processes{path} as in one: of {name} {words}. Try check_rule with "
                    "one process for where it comes from."
                )
    of_ranks: list[list[str]] = [[]] * processes
    dist.all_gather_object(of_ranks, found)
    if rank == 0:
        found = [words for of_rank in of_ranks for words in of_rank]
        torch.save(found, Path(folder, "found.pt"))
    gc.collect()  # of sharded modules, which are in cycles and hold the group: gloo's threads would abort at the end
    dist.destroy_process_group()
