"""Checks of what the ranks publish: parameters, their order, weights of replicas, hyper-parameters, cover of a matrix.

`lightning_namo.optim.step_agreement` compares the ranks in a step; its fingerprint, tolerances and `Alarm` are here.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_namo.sharding.layout import FlatRange, ShardRegion
from lightning_namo.sharding.process_group import gather, initialized

ParameterSignature: TypeAlias = tuple[str, tuple[int, ...], torch.dtype]  # a parameter's name, full shape and dtype
HyperParameters: TypeAlias = list[tuple[str, dict[str, Any]]]  # of each group its name and hyper-parameters
SUMMATION = 1e-5  # relative error of a squared norm in float32, summed in another order
CLOSE = 1e-6  # relative: two kinds of CPUs may compute a schedule's cosine, in float32, with another last bit
_CHUNK = 2**22  # elements of a checksum at a time
_STRIDE = 0x9E3779B97F4A7C15 - 2**64  # odd, so that every position counts differently


@dataclass(frozen=True)
class ParameterDescription:
    """A parameter on one rank: what must be the same on all ranks, and which part of it this rank holds.

    Args:
        name: For messages.
        shape: Of the whole parameter.
        dtype: Of its elements.
        region: The part that this rank holds, equal on all ranks that hold the same part; None: nothing.
        checksum: Of the local weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    region: Hashable
    checksum: int


def check_agreement(published: Sequence[Sequence[ParameterSignature]]) -> None:
    """Raise unless all ranks have the same parameters in the same order.

    Args:
        published: For each rank the (name, shape, dtype) of its parameters.

    Raises:
        ValueError: Naming the first parameter that differs.
    """
    expected = published[0]
    advice = (
        "Build the same model and the same parameter groups on every rank, and step several optimizers in the same "
        "order. Strategies that give each rank other parameters (ZeroRedundancyOptimizer, DeepSpeed, pipeline "
        "parallelism) are not supported: take DDP, FSDP or FSDP2."
    )
    for rank, found in enumerate(published):
        for theirs, ours in zip(expected, found, strict=False):
            if theirs != ours:
                raise ValueError(
                    f"Expected the same parameters on all ranks, but rank 0 has {_words(theirs)} where rank {rank} "
                    f"has {_words(ours)}. {advice}"
                )
        if len(found) != len(expected):
            longer, more = (0, expected) if len(expected) > len(found) else (rank, found)
            raise ValueError(
                f"Expected the same parameters on all ranks, but rank 0 has {len(expected)} and rank {rank} has "
                f"{len(found)}: only rank {longer} has {_words(more[min(len(found), len(expected))])}. {advice}"
            )


def check_order(in_order: Sequence[bool]) -> None:
    """Raise if the ranks take two optimizers in another order.

    Args:
        in_order: For each rank, whether the optimizer at hand was built after the one that was planned last.
    """
    if len(set(in_order)) > 1:
        raise ValueError(
            f"Expected all ranks to step several optimizers in one order, but rank {in_order.index(not in_order[0])} "
            "steps them in another order than rank 0. Step them in the same order on all ranks."
        )


def check_replicas(published: Sequence[Sequence[ParameterDescription]]) -> None:
    """Raise if ranks that hold one and the same part of a parameter have different weights there.

    Args:
        published: For each rank, its parameters, in the same order.

    Raises:
        ValueError: Naming the parameter and two ranks.
    """
    for of_ranks in zip(*published, strict=True):
        first: dict[Hashable, tuple[int, int]] = {}
        for rank, holding in enumerate(of_ranks):
            if holding.region is None:
                continue
            other, expected = first.setdefault(holding.region, (rank, holding.checksum))
            if holding.checksum != expected:
                raise ValueError(
                    f"Expected ranks {other} and {rank} to hold replicas of {holding.name} {holding.shape}, but their "
                    "weights differ. All ranks of the default process group must train one model: start it from the "
                    "same weights everywhere (DistributedDataParallel and FSDP see to it), and step several optimizers "
                    "in the same order on all ranks. Expert and pipeline parallelism, model averaging and local SGD "
                    "are not supported."
                )


def check_hyper_parameters(published: Sequence[HyperParameters]) -> None:
    """Raise if a hyper-parameter differs between ranks.

    Args:
        published: For each rank the groups' names and hyper-parameters, as plain values.

    Raises:
        ValueError: Naming the hyper-parameter, its group, and both values.
    """
    for rank, groups in enumerate(published):
        if (names := [name for name, _ in groups]) != (first := [name for name, _ in published[0]]):
            raise ValueError(
                f"Expected the same parameter groups on all ranks, but rank 0 has {first} and rank {rank} has {names}."
            )
        for (name, expected), (_, found) in zip(published[0], groups, strict=True):
            for key, value in found.items():
                if not _same(expected.get(key), value):
                    raise ValueError(
                        f"Expected the same {key} of group {name!r} on all ranks, but rank 0 has {expected.get(key)} "
                        f"and rank {rank} has {value}. Set it alike on every rank; a schedule that follows a metric "
                        "(ReduceLROnPlateau) needs the metric averaged over the ranks: log it with sync_dist=True."
                    )


def _same(expected: Any, value: Any) -> bool:
    if isinstance(expected, float) and isinstance(value, float):
        return math.isclose(expected, value, rel_tol=CLOSE, abs_tol=0.0) or (expected != expected and value != value)
    return bool(expected == value)


def _words(described: ParameterSignature) -> str:
    return " ".join(str(part) for part in described)


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor 64 bits that depend on the value and the place of every element; reads the device once."""
    if not tensors:
        return []
    sums = [_checksum(tensor.detach()) for tensor in tensors]
    return [int(number) for number in torch.stack([number.to(sums[0].device) for number in sums]).tolist()]


def _checksum(tensor: Tensor) -> Tensor:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(flat, _CHUNK):
        if not chunk.numel():
            continue
        if chunk.itemsize > 1:
            chunk = chunk + 0  # minus zero is zero
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[chunk.itemsize]
        places = torch.arange(1, len(chunk) + 1, device=tensor.device) * _STRIDE
        total = total * 31 + (chunk.view(integers).to(torch.int64) * (places ^ (places >> 29))).sum()
    return total


def plain(hyper: HyperParameters) -> HyperParameters:
    """The same with the values of tensors, which reads the device."""
    return [
        (name, {key: value.tolist() if isinstance(value, Tensor) else value for key, value in of_group.items()})
        for name, of_group in hyper
    ]


def fingerprint(number: int, hyper: HyperParameters) -> int:
    """24 bits, exact in float32, of which optimizer it is and of all its hyper-parameters that are no tensors."""
    values = [
        f"{value:.12g}" if isinstance(value, float) else repr(value)
        for _, of_group in hyper
        for value in of_group.values()
        if not isinstance(value, Tensor)
    ]
    return zlib.crc32(f"{number} {' '.join(values)}".encode()) & 0xFFFFFF


def tolerance(replicas: int, dtype: torch.dtype) -> float:
    """Up to which relative difference the squared norms of replicas' gradients count as the same.

    A reduction over k ranks rounds every element up to k - 1 times; the roundings are independent, so that a norm
    moves by less than sqrt(k) eps of the gradient's dtype, and its square by twice that. Replicas that average by the
    same all-reduce have the same bits; twice the bound leaves room for those that reduce in another order. To that
    comes the sum of squares itself.
    """
    eps = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    return SUMMATION + 4 * math.sqrt(replicas) * eps


class Alarm:
    """Flags of a step that all ranks have alike: read at once on a CPU, else in the next step, without a wait.

    An accelerator copies the flags to the host beside its work. In the next step, a whole forward and backward pass
    later, they are there; the wait for the copy bounds how far the host may run ahead, and empties no queue.
    """

    def __init__(self, device: torch.device) -> None:
        self.at_once = device.type == "cpu"
        self._flags: Tensor | None = None
        self._event: torch.Event | None = None

    def set(self, flags: Tensor) -> None:
        """Take the flags of this step, numbers of one dimension; above zero is an alarm."""
        if flags.device.type in ("cpu", "meta"):
            self._flags, self._event = flags, None
        elif flags.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._flags = None  # a graph is replayed without this code
        else:
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.Event(flags.device)
            self._event.record()

    def read(self) -> list[float]:
        """The flags that were set last, once; none if there are none."""
        flags, self._flags = self._flags, None
        if flags is None or flags.is_meta:
            return []
        if self._event is not None:
            self._event.synchronize()
        return [float(flag) for flag in flags.tolist()]


def check_same(parameters: Sequence[ParameterSignature]) -> None:
    """Raise on all ranks, by name, if they have different parameters. Collective where there are other ranks.

    Args:
        parameters: This rank's, each as name, full shape and dtype.
    """
    if initialized():
        check_agreement(gather(list(parameters), "compare their parameters"))


def check_cover(name: str, shape: tuple[int, int], regions: list[ShardRegion]) -> None:
    """Raise unless the distinct regions tile the matrix: runs end to end, or bands of rows cut into columns."""
    rows, cols = shape
    intervals: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for region in regions:
        if isinstance(region, FlatRange):
            intervals[0, rows].append((region.start, region.stop))
        else:
            intervals[region.row, region.row_end].append((region.col, region.col_end))
    width = rows * cols if any(isinstance(region, FlatRange) for region in regions) else cols
    tiled = _tiles(list(intervals), rows) and all(_tiles(columns, width) for columns in intervals.values())
    if not tiled and rows * cols:
        raise ValueError(
            f"Expected the shards of {name} {shape} to make up the whole matrix, but the ranks hold "
            f"{regions}. This placement cannot be served; route the parameter to AdamW (adamw=...) or shard it "
            "over dimension 0 or 1."
        )


def _tiles(intervals: list[tuple[int, int]], length: int) -> bool:
    position = 0
    for begin, end in sorted(intervals):
        if begin != position:
            return False
        position = end
    return position == length
