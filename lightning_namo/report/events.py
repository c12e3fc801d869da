"""Scalars of TensorBoard's event files, also of broken ones and of runs that were resumed."""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import masked_crc32c  # type: ignore[import-untyped]

PATTERN = "events.out.tfevents.*"

_HEADER, _CRC = 12, 4  # bytes: the length and its checksum, and the checksum of the record
# Lightning's ThroughputMonitor logs these at batches of evaluation, the logger hp_metric at 0.
_OTHER_STEPS = re.compile(r"hp_metric|(validate|test|predict)/(time|batches|samples|lengths|.*_per_sec|.*mfu)")
AFTER = re.compile(r"(test|predict)[/_].*")
"""Tags of what is done once training has ended, at a step after the last one."""


@dataclass(frozen=True)
class Curve:
    """A scalar in the order of its steps.

    Args:
        steps: int64 `(n,)`.
        values: float64 `(n,)`.
        seconds: float64 `(n,)`, of a file the time of day, of a run the time spent in it so far.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def __getitem__(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Curve:
        return Curve(self.steps[which], self.values[which], self.seconds[which])


@dataclass
class EventFile:
    """What could be read of a file; `broken` says where reading ended before its end, and why."""

    path: Path
    started: float = 0.0  # time of the first record, or of an earlier one by its clock
    curves: dict[str, Curve] = field(default_factory=dict)
    broken: str | None = None


def read_event_file(path: Path) -> EventFile:
    """Read the scalars of a file up to its end, or up to the first bytes that are not a record.

    The checksum of a record is not tested, only that of its length: that finds bytes that are missing or are no
    event file, and not a number that changed.
    """
    found = EventFile(path)
    try:
        _read(found)
    except OSError as error:
        found.broken = f"it cannot be read ({error.strerror})"
    return found


def _read(found: EventFile) -> None:
    columns: dict[str, tuple[array[int], array[float], array[float]]] = {}
    with found.path.open("rb") as file:
        for record in _records(file, found):
            try:
                event = Event.FromString(record)
            except DecodeError:
                found.broken = f"no event in the record that ends at byte {file.tell():,}"
                break
            step, seconds = event.step, event.wall_time
            found.started = found.started or seconds
            for value in event.summary.value:
                tag = value.tag
                if (column := columns.get(tag)) is None:
                    if value.WhichOneof("value") != "simple_value":
                        continue
                    column = columns[tag] = array("q"), array("d"), array("d")
                column[0].append(step)
                column[1].append(value.simple_value)
                column[2].append(seconds)
    for tag, (steps, values, times) in columns.items():
        found.curves[tag] = Curve(np.array(steps, np.int64), np.array(values), np.array(times))
        found.started = min(found.started, min(times))  # clocks are set back


def _records(file: BinaryIO, found: EventFile) -> Iterator[bytes]:
    """The records of a file; where they end too early, `found` is told."""
    while header := file.read(_HEADER):
        length = _length(header)
        if length is None:
            start = file.tell() - len(header)
            found.broken = f"no length of a record at byte {start:,}" if len(header) == _HEADER else _cut_short(start)
            return
        record = file.read(length + _CRC)
        if len(record) < length + _CRC:
            found.broken = _cut_short(file.tell() - len(record) - _HEADER)
            return
        yield record[:length]
    if file.tell() == 0:
        found.broken = "it is empty"


def _cut_short(start: int) -> str:
    return f"the last record, at byte {start:,}, is cut short; a run that is going on may write the rest"


@functools.lru_cache(maxsize=1024)  # records of a tag are equally long
def _length(header: bytes) -> int | None:
    length = int.from_bytes(header[:8], "little")
    return length if int.from_bytes(header[8:], "little") == masked_crc32c(header[:8]) else None


def read_folder(folder: Path) -> tuple[dict[str, Curve], list[str]]:
    """The curves of a run by tag, and a line for each of its files that is broken."""
    files = [read_event_file(path) for path in sorted(folder.glob(PATTERN))]
    return merge(files), [f"{file.path.name}: {file.broken}." for file in files if file.broken]


def merge(files: Sequence[EventFile]) -> dict[str, Curve]:
    """The curves of a run that was resumed: a later file wins from its first step on.

    Seconds count from the start of the first file, without the pauses between files. A file of one step, or without
    curves of training beside others that have them, as an evaluation leaves it, wins at its steps only.
    """
    kept: dict[str, list[Curve]] = {}
    passed = 0.0
    for file in sorted(files, key=lambda file: file.started):
        curves = {tag: curve for tag, curve in file.curves.items() if not _OTHER_STEPS.fullmatch(tag)}
        if not curves:
            continue
        first = min(int(curve.steps.min()) for curve in curves.values())
        trained = any(tag.startswith("train/") for tag in curves) or not any(tag.startswith("train/") for tag in kept)
        if trained and first < max(int(curve.steps.max()) for curve in curves.values()):
            for tag, parts in kept.items():
                kept[tag] = [part[part.steps < first] for part in parts]
        passed = max((part.seconds.max() for parts in kept.values() for part in parts if len(part.steps)), default=0.0)
        for tag, curve in curves.items():
            since = Curve(curve.steps, curve.values, curve.seconds - file.started + passed)
            kept.setdefault(tag, []).append(since)
    joined = {tag: _last_of_each_step(parts) for tag, parts in kept.items()}
    return {tag: curve for tag, curve in joined.items() if len(curve.steps)}


def _last_of_each_step(parts: Sequence[Curve]) -> Curve:
    steps, values, seconds = (
        np.concatenate([getattr(part, name) for part in parts])[::-1] for name in ("steps", "values", "seconds")
    )
    _, last = np.unique(steps, return_index=True)
    return Curve(steps, values, seconds)[last]
