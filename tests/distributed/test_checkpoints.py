"""A run goes on from its checkpoint as if it had not stopped: from every strategy, in every strategy that reads it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.helpers.launch import run_ranks
from tests.helpers.resuming import PLACES, readable, run_cases
from tests.helpers.rules import RULES
from tests.helpers.worker import relative_error

pytestmark = pytest.mark.timeout(900)  # the first test waits for all the runs


PLAIN = [place for place in PLACES if "bf16" not in place]
RESUMING = [place for place in PLAIN if "sharded" not in place]
EVERYWHERE = ("NAMOD", "AdaMuon")  # v by column, v by element; the others in a part of the table
CASES = [
    (source, to, optimizer)
    for to in RESUMING
    for source in PLAIN
    for optimizer in RULES
    if readable(source, to) and (optimizer in EVERYWHERE or to in ("single", "fsdp1 2", "fsdp2 2"))
]
CASES += [(place, place.removesuffix(" sharded"), o) for place in PLACES if "bf16" in place for o in RULES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


def run_all(cases: list[tuple[str, str, str | None]], folder: str) -> dict[Any, dict[str, Tensor]]:
    """Run each case once, those of a number of processes in one launch."""
    answers: dict[Any, dict[str, Tensor]] = {}
    for world in sorted({PLACES[to][0] for to, _, _ in cases}):
        of_world = [case for case in dict.fromkeys(cases) if PLACES[case[0]][0] == world]
        answers |= run_ranks(run_cases, world, of_world, folder, timeout=400)[0]
    return answers


@pytest.fixture(scope="module")
def cases(selected: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(source, to, optimizer) of all tests that are to be run."""
    adopting = [("single", to, "adopter") for case in selected if "source" not in case for to in ("single", case["to"])]
    return [(case["source"], case["to"], case["optimizer"]) for case in selected if "source" in case] + adopting


@pytest.fixture(scope="module")
def uninterrupted(cases: list[tuple[str, str, str]], folder: str) -> dict[Any, dict[str, Tensor]]:
    """Runs without a stop; their checkpoints are left in the folder."""
    return run_all([(source, "AdamW" if o == "adopter" else o, None) for source, _, o in cases], folder)


@pytest.fixture(scope="module")
def resumed(
    cases: list[tuple[str, str, str]], folder: str, uninterrupted: dict[Any, dict[str, Tensor]]
) -> dict[Any, dict[str, Tensor]]:
    return run_all([(to, o, source) for source, to, o in cases], folder)


def few(source: str, to: str, optimizer: str) -> bool:
    """What is not slow: full and sharded checkpoints, of one process and of two."""
    return optimizer == "NAMOD" and source in ("single", "fsdp1 2", "fsdp2 2 sharded") and to in ("single", "fsdp2 2")


@pytest.mark.parametrize(
    ("source", "to", "optimizer"), [pytest.param(*case, marks=[] if few(*case) else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    source: str, to: str, optimizer: str, uninterrupted: dict[Any, Any], resumed: dict[Any, Any]
) -> None:
    expected, actual = uninterrupted[source, optimizer, None], resumed[to, optimizer, source]
    same_world = source.removesuffix(" sharded") == to
    tolerance = 0 if same_world else 1e-5 if "fsdp1" in source + to else 1e-12  # FSDP1 trains in float32
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert relative_error(weight, expected[name]) <= tolerance, name


@pytest.mark.parametrize("to", [pytest.param(to, marks=[] if to == "fsdp2 2" else pytest.mark.slow) for to in RESUMING])
def test_a_run_of_adamw_goes_on_with_namo_d_as_on_one_device(to: str, resumed: dict[Any, Any]) -> None:
    expected, actual = resumed["single", "adopter", "single"], resumed[to, "adopter", "single"]
    for name, weight in actual.items():
        assert relative_error(weight, expected[name]) <= (1e-5 if "fsdp1" in to else 1e-12), name
