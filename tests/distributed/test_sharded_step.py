"""A sharded step equals the single-process step: every algorithm, layout and world size, in real processes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lightning_namo.testing.layouts import LAYOUTS
from tests.helpers.launch import run_ranks
from tests.helpers.rules import RULES
from tests.helpers.worker import STEPS, VARIANTS, compare_layouts, expected_results

# Relative to the weights' norm. The iteration sees the same bits on every layout, in both dtypes, so what is left is
# float32 rounding in the sums of squares (measured: at most 1.2e-7).
TOLERANCES = {variant: 1e-12 if variant == "float64-exact" else 1e-6 for variant in VARIANTS}
ITERATED = [variant for variant in VARIANTS if VARIANTS[variant][1] == "newton_schulz"]  # sent in bfloat16 in all
WORLD_SIZES = [pytest.param(1, marks=pytest.mark.slow), 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
EXACT, *OTHERS = TOLERANCES

expected = functools.cache(expected_results)


@functools.cache
def of_dtype(world_size: int, dtype: torch.dtype) -> list[dict[Any, Any]]:
    """One process group serves all cases of a world size and a dtype."""
    results = {variant: expected(variant) for variant in TOLERANCES if VARIANTS[variant][0] == dtype}
    return run_ranks(compare_layouts, world_size, dtype, list(LAYOUTS), results, timeout=280)


def answers(world_size: int, variant: str) -> list[dict[Any, Any]]:
    return of_dtype(world_size, VARIANTS[variant][0])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("variant", [EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", RULES)
def test_sharded_step_equals_single_process(algorithm: str, layout: str, variant: str, world_size: int) -> None:
    for answer in answers(world_size, variant):
        case = answer[variant, algorithm, layout]
        assert case["weights"] <= TOLERANCES[variant]
        assert case["state"] <= TOLERANCES[variant]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("variant", ITERATED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", RULES)
def test_every_rank_ends_with_the_same_weights_and_runs_the_same_collectives(
    algorithm: str, layout: str, variant: str, world_size: int
) -> None:
    cases = [answer[variant, algorithm, layout] for answer in answers(world_size, variant)]
    assert all(case["replicas"] == cases[0]["replicas"] for case in cases)
    assert all(case["wire"].calls == cases[0]["wire"].calls for case in cases)
    assert cases[0]["wire"].calls.count("all_reduce") >= STEPS - 1
    assert set(cases[0]["wire"].calls) == {"all_reduce", "all_to_all"}  # the plan was made at the first step


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("variant", ITERATED)
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2-even", "fsdp2-shard1"])
@pytest.mark.parametrize("algorithm", ["NAMO", "NAMOD", "Muon"])
def test_bytes_sent_keep_to_the_formula(algorithm: str, layout: str, variant: str, world_size: int) -> None:
    cases = [answer[variant, algorithm, layout] for answer in answers(world_size, variant)]
    R, steps, elements = world_size, STEPS - 1, cases[0]["elements"]
    formula = 2 * (R - 1) / R * elements / R * 2
    average = sum(case["wire"].exchanged for case in cases) / R / steps
    assert average <= 1.05 * formula
    assert cases[0]["wire"].calls.count("all_reduce") == steps


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("variant", ITERATED)
def test_under_ddp_only_results_travel(variant: str, world_size: int) -> None:
    cases = [answer[variant, "NAMO", "ddp"] for answer in answers(world_size, variant)]
    results = (world_size - 1) * cases[0]["elements"] * 2  # each owner sends its polar factors to all others
    assert sum(case["wire"].exchanged for case in cases) == results * (STEPS - 1)
