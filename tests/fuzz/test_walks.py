"""A hundred short walks over layouts and events, on fixed seeds; and what a walk says when something is wrong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.fuzz.compare import Tally
from tests.fuzz.pool import Pool
from tests.fuzz.run import report, run, shrink
from tests.fuzz.walk import WORLDS, Event, Place, draw

SEEDS = range(100)
EVENTS = {"step", "schedule", "reload", "resume", "evaluate", "unfreeze", "freeze", "deepcopy", "channels_last", "cast"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.parametrize("seed", [s if s % 10 == 0 else pytest.param(s, marks=pytest.mark.slow) for s in SEEDS])
def test_a_walk_ends_where_the_reference_does(seed: int, pool: Pool) -> None:
    walk = draw(seed, short=True)
    failure = run(walk, pool, Tally())
    if failure is not None:
        pytest.fail(report(*shrink(walk, failure, pool), short=True), pytrace=False)


def test_the_walks_meet_every_event_and_layout() -> None:
    walks = [draw(seed, short=True) for seed in SEEDS]
    places = [walk.place for walk in walks] + [e.args["to"] for walk in walks for e in walk.events if "to" in e.args]
    assert {place.layout for place in places} == set(WORLDS)
    met = {event.kind for walk in walks for event in walk.events}
    assert met == EVENTS


@pytest.mark.slow
def test_bounds_are_narrow(pool: Pool) -> None:
    """Half of the walks in float64 come within a factor of ten of what rounding may do at worst."""
    worst = []
    for walk in (draw(seed, short=True) for seed in SEEDS[:60]):
        if {layer.dtype for layer in walk.layers} == {"float64"} and walk.hyper["momentum_dtype"] is None:
            tally = Tally()
            assert run(walk, pool, tally) is None
            worst.append(tally.worst)
    assert len(worst) > 20
    assert 0.1 < statistics.median(worst) <= 1


@pytest.mark.parametrize("place", [Place("single", 1), Place("ddp", 2), Place("fsdp2", 2)])
def test_a_walk_that_fails_is_cut_to_the_event_that_does_it_and_says_how_to_repeat_it(place: Place, pool: Pool) -> None:
    walk = replace(draw(3, short=True), place=place)
    walk = replace(walk, events=(*(e for e in walk.events if e.kind == "step"), Event(9, "spoil")))
    assert len(walk.events) > 2
    failure = run(walk, pool, Tally())
    assert failure is not None
    smaller, failure = shrink(walk, failure, pool)
    assert [event.kind for event in smaller.events] == ["spoil"]
    text = report(smaller, failure, short=True)
    assert "walk 3 fails after event 9: l0.layer.weight" in text
    assert "python -m tests.fuzz --walk 3 --events 9 --short" in text
