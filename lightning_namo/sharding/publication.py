"""What the ranks tell one another before the first step, and compare."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from lightning_namo.sharding.agreement import (
    HyperParameters,
    ParameterDescription,
    check_agreement,
    check_hyper_parameters,
    check_order,
)
from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.process_group import gather

_HISTORY: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
"""For each process group the number of exchanges made in it, and the number of the last one's optimizer."""


@dataclass(frozen=True)
class Published:
    """What a rank publishes before the first step, beside its matrices.

    Args:
        matrices: The parameters in the order of the matrices.
        adamw: The parameters that are not matrices.
        hyper: Of each group its name and plain hyper-parameters.
        number: Of the optimizer, in the order in which this process built them.
        compare: Whether replicas' weights are to be compared.
    """

    matrices: Sequence[ParameterDescription] = ()
    adamw: Sequence[ParameterDescription] = ()
    hyper: HyperParameters = field(default_factory=list)
    number: int = 0
    compare: bool = True


@dataclass(frozen=True)
class Replicas:
    """The replicas of one parameter.

    Args:
        count: How many ranks, at most, hold the same part of it; the same on all ranks.
        weight: 1 on a rank that repeats what an earlier rank holds; on that one, minus the number of ranks that repeat
            it; 0 if none does. With these weights a number that is the same on all replicas adds up to zero.
    """

    count: int
    weight: int

    @classmethod
    def of(cls, rank: int, parts: Sequence[ParameterDescription]) -> Replicas:
        """From every rank's part of a parameter."""
        holders: dict[Any, list[int]] = defaultdict(list)
        for other, part in enumerate(parts):
            if part.region is not None:
                holders[part.region].append(other)
        same = holders.get(parts[rank].region, [rank])
        return cls(max(map(len, holders.values()), default=1), 1 - len(same) if same[0] == rank else 1)


def publish(
    matrices: Sequence[Matrix], mine: Published, bucket_bytes: int | None, default: int
) -> tuple[list[Sequence[Matrix]], list[Published], int, int]:
    """Send what this rank has to all ranks, and compare. Collective.

    Args:
        matrices: This rank's view of every matrix.
        mine: What else it publishes.
        bucket_bytes: As set by the user: must be the same on all ranks. None: not set.
        default: For want of it, by this rank's memory.

    Returns:
        For each rank its matrices, and what else it published; the number of exchanges made in the process group
        before; and the bucket size of all ranks: that was set, or the smallest default.

    Raises:
        ValueError: On all ranks, if they disagree.
        RuntimeError: If not all ranks take part.
    """
    history = _HISTORY.setdefault(dist.group.WORLD, [0, -1])
    in_order, history[1] = mine.number > history[1], mine.number
    number, history[0] = history[0], history[0] + 1
    every = gather((matrices, mine, (bucket_bytes, default), in_order), "compare their parameters before a step")
    published = [of_rank for _, of_rank, *_ in every]
    for of_ranks in ([of_rank.adamw for of_rank in published], [of_rank.matrices for of_rank in published]):
        check_agreement([[(d.name, d.shape, d.dtype) for d in descriptions] for descriptions in of_ranks])
    check_order([in_order for *_, in_order in every])
    if len(bounds := {bound for _, _, (bound, _), _ in every}) > 1:
        raise ValueError(
            f"Expected the same bucket_bytes on all ranks but got {sorted(bounds, key=str)}. Set it alike on all ranks."
        )
    check_hyper_parameters([of_rank.hyper for of_rank in published])
    smallest = min(default for _, _, (_, default), _ in every)
    return [of_rank for of_rank, *_ in every], published, number, smallest if bucket_bytes is None else bucket_bytes
