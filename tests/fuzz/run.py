"""Runs walks: on the ranks of a pool, against the reference in this process; shrinks one that fails."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fuzz.compare import DifferenceError, Reference, Tally
from tests.fuzz.pool import Pool, PoolError
from tests.fuzz.ranks import Answer, take_part
from tests.fuzz.walk import Event, Walk


@dataclass
class Failure:
    """What went wrong, after which event (None: at the start)."""

    event: int | None
    message: str


def run(walk: Walk, pool: Pool, tally: Tally) -> Failure | None:
    """Run a walk; what it compared is added to the tally."""
    reference = Reference(walk)
    reference.tally = tally
    event: Event | None = None
    with tempfile.TemporaryDirectory() as folder:
        loaded, rest, first = None, list(walk.events), 0
        while True:
            end = next((k for k, e in enumerate(rest) if e.kind == "resume"), len(rest) - 1)
            now, rest = rest[: end + 1], rest[end + 1 :]
            saved = f"{folder}/{first}"
            place = walk.standing(first).place
            try:
                answers = pool.run(
                    place.world,
                    place.layout != "single",
                    take_part,
                    walk,
                    first,
                    [e.number for e in now],
                    loaded,
                    saved,
                )
            except PoolError as error:
                return Failure(None, f"after event {first}: {error}")
            failure = check(reference, event, now, answers)
            if failure is not None:
                return failure
            if not now or now[-1].kind != "resume":
                return None
            event, first, loaded = now[-1], now[-1].number + 1, saved


def check(
    reference: Reference, resumed: Event | None, events: Sequence[Event], answers: list[Answer]
) -> Failure | None:
    """Hold what ranks saw of a part of a walk against the reference."""
    event = resumed
    seen = list(zip(*(answer.seen for answer in answers), strict=False))
    try:
        for step, now in enumerate(seen):
            if step:
                event = events[step - 1]
                reference.live_through(event, list(seen[step - 1]), list(now))
            elif resumed is not None:
                reference.live_through(resumed, list(now), list(now))
            reference.compare(event, list(now))
    except DifferenceError as difference:
        return Failure(None if event is None else event.number, str(difference))
    except Exception:
        return Failure(None if event is None else event.number, f"the reference: {traceback.format_exc()}")
    errors = [f"rank {rank}: {answer.error}" for rank, answer in enumerate(answers) if answer.error]
    if errors:
        ahead = events[len(seen) - 1].number if seen and len(seen) <= len(events) else None
        return Failure(ahead, "\n".join(errors))
    return None


def shrink(walk: Walk, failure: Failure, pool: Pool, seconds: float = 90) -> tuple[Walk, Failure]:
    """A walk of fewer events that fails, too: halves, quarters, then single events are cut, while there is time."""
    end = time.monotonic() + seconds
    events = [e.number for e in walk.events if failure.event is None or e.number <= failure.event]
    size = max(1, len(events) // 2)
    start = walk.only(events)
    if (again := run(start, pool, Tally())) is None:
        return walk, failure
    walk, failure = start, again
    while size and time.monotonic() < end:
        cut = False
        for begin in range(0, len(events), size):
            kept = events[:begin] + events[begin + size :]
            smaller = walk.only(kept)
            if time.monotonic() < end and (again := run(smaller, pool, Tally())) is not None:
                walk, failure, events, cut = smaller, again, kept, True
                break
        if not cut:
            size //= 2
    return walk, failure


def report(walk: Walk, failure: Failure, short: bool) -> str:
    """What a person needs: the seed, what is left of the walk, the difference and how to see it again."""
    numbers = ",".join(str(e.number) for e in walk.events)
    lines = [
        f"walk {walk.seed} fails after event {failure.event}: {failure.message}",
        f"{walk.optimizer}({walk.hyper}), {walk.place}, bucket_bytes={walk.bucket_bytes}, batched={walk.batched}",
        *(f"  l{i}: {layer}" for i, layer in enumerate(walk.layers)),
        *(f"  event {e.number}: {e.kind} {e.args or ''}" for e in walk.events),
        f"Again: python -m tests.fuzz --walk {walk.seed} --events {numbers}{' --short' if short else ''}",
    ]
    return "\n".join(lines)
