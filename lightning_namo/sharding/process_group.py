"""The default process group: whether there is one, a mean over its ranks, leaving it, and errors of its collectives."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

_GLOO_RELEASES_S = 0.2  # tensors that its threads hold, on a busy machine too


def initialized() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def current_group() -> Any:
    """The default process group, or None."""
    return dist.group.WORLD if initialized() else None


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if initialized() else (0, 1)


@contextlib.contextmanager
def collective(purpose: str) -> Iterator[None]:
    """Around a collective: what to look for if the others do not come.

    Raises:
        RuntimeError: In place of the backend's, with its message.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"Expected all ranks to meet to {purpose}, but some did not come: {error} Look for a rank that raised an "
            "error (its own message says why), that ended earlier (give all ranks the same number of batches; DDP's "
            "Join is not supported), that steps several optimizers in another order, or that has no part of the model."
        ) from error


def gather(value: Any, purpose: str) -> list[Any]:
    """Every rank's value (pickled), in the order of the ranks; this process's alone without a group.

    Args:
        value: This rank's.
        purpose: What for, in the message of an error.
    """
    if not initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    with collective(purpose):
        dist.all_gather_object(gathered, value)
    return gathered


def largest_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over the ranks, in place. Collective."""
    with collective("share their statistics"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over the ranks, in place; the same bits on all of them."""
    if initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def leave(failed: bool = False) -> None:
    """Leave the default process group, if there is one, at the end of a program.

    gloo's threads let go of tensors a moment after a collective is over, and need Python for it: a thread that comes
    late, when Python is ending, aborts the program (pytorch #179291). Sharded modules keep the group alive, so that
    leaving it does not end its threads; they get the time instead.

    Args:
        failed: The program ends with an error. NCCL, which would wait for the other ranks, is not left then.
    """
    if initialized() and not (failed and "nccl" in dist.get_backend()):  # which may be "cpu:gloo,cuda:nccl"
        gc.collect()
        dist.destroy_process_group()
        time.sleep(_GLOO_RELEASES_S)
