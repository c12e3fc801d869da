"""The owner of a matrix measures it: spectra are the same on every rank and under every layout as on one process."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, Muon, build_optimizer
from lightning_namo.sharding.local import local_tensor
from lightning_namo.telemetry.spectra import NUMBERS, UNLIFTED
from lightning_namo.telemetry.spectral_probe import SpectralProbe
from lightning_namo.testing.layouts import LAYOUTS, Odd, clean_name, new_module, prescribed_gradients
from tests.helpers.launch import run_ranks

Numbers = dict[str, dict[str, float]]
CASES: dict[str, Any] = {
    "NAMO": (NAMO, {}),
    "post": (Muon, {"order": "post", "nesterov": False}),
    "none": (Muon, {"order": "none"}),
}


def watched(case: str, module: nn.Module, kind: type[Odd]) -> list[Numbers]:
    """Readings of steps 2 and 4 of 5, with the gradients of steps 3 and 5."""
    cls, keys = CASES[case]
    optimizer = build_optimizer(module, cls, blocks=kind.blocks, orthogonalizer="svd", lr=0.01, **keys)
    optimizer.bucket_bytes = 1500
    probe, readings = SpectralProbe(optimizer, None, rank=2), []
    for step in range(5):
        optimizer.zero_grad()
        module(prescribed_gradients(new_module(kind, torch.float64), step)).backward()
        if step in (1, 3):
            probe.watch(step)
        optimizer.step()
        taken = probe.take()
        assert (taken is not None) == (step in (2, 4))
        if taken is not None:
            assert taken[0] == step - 1
            readings.append({clean_name(name): spectra.numbers() for name, spectra in taken[1].items()})
    return readings


def on_rank(rank: int, layout: str) -> Any:
    kind, wrap = LAYOUTS[layout]
    return {case: watched(case, wrap(new_module(kind, torch.float64)), kind) for case in CASES}


@cache
def alone(case: str, kind: type[Odd]) -> list[Numbers]:
    return watched(case, new_module(kind, torch.float64), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_and_layouts_read_the_same(layout: str) -> None:
    first, second = run_ranks(on_rank, 2, layout)
    for case, readings in first.items():
        expected = alone(case, LAYOUTS[layout][0])
        assert readings == second[case]
        for found, of_one in zip(readings, expected, strict=True):
            assert found.keys() == of_one.keys()
            for matrix, numbers in of_one.items():
                assert found[matrix] == pytest.approx(numbers, rel=1e-4, abs=2e-6), matrix


def momentum_of(gradients: list[np.ndarray]) -> np.ndarray:
    return sum(0.05 * 0.95 ** (len(gradients) - 1 - i) * gradient for i, gradient in enumerate(gradients))


def polar(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def test_readings_of_one_process_are_what_numpy_says() -> None:
    """For each matrix of the module, experts and blocks among them, from its gradients alone."""
    true: dict[str, Any] = {
        "tall.layer.weight": lambda G: [G],
        "groups.layer.weight": lambda G: list(G.reshape(3, 3, -1)),
        "deconv.layer.weight": lambda G: [G.reshape(4, -1).T],
        "fused.layer.weight": lambda G: [G[:9], G[9:14], G[14:]],
        "experts.layer.weight": list,
        "turned.layer.weight": lambda G: [X.T for X in G],
    }
    gradients: dict[str, list[list[np.ndarray]]] = {name: [] for name in true}
    for step in range(5):
        full = prescribed_gradients(new_module(Odd, torch.float64), step)
        for name, matrices in true.items():
            gradients[name].append(matrices(full[name.split(".")[0]]["weight"].numpy()))
    for reading, until in zip(alone("NAMO", Odd), (2, 4), strict=True):
        for name, of_steps in gradients.items():
            count = len(of_steps[0])
            for i in range(count):
                found = reading[f"{name}[{i}]" if count > 1 else name]
                of_matrix = [matrices[i] for matrices in of_steps]
                G, M, ahead = of_matrix[until - 1], momentum_of(of_matrix[:until]), of_matrix[until]
                of_G, of_M = (np.linalg.svd(X, compute_uv=False) for X in (G, M))
                nuclear = np.linalg.svd(ahead, compute_uv=False).sum()
                expected = {
                    "sigma_gradient_q50": np.median(of_G),
                    "sigma_momentum_q100": of_M[0],
                    "filter_ratio_rank": of_M[1] / of_G[1],
                    "stable_rank_momentum": (of_M**2).sum() / of_M[0] ** 2,
                    "unlifted_share_gradient": np.mean(of_G < UNLIFTED * np.linalg.norm(of_G)),
                    "alignment_momentum": (polar(M) * ahead).sum() / nuclear,
                    "alignment_gradient": (polar(G) * ahead).sum() / nuclear,
                    "orthogonality_error": 0.0,
                }
                if len(of_G) > 2:
                    expected["spectral_gap_momentum"] = of_M[1] - of_M[2]
                chosen = {key: found[key] for key in expected}
                assert chosen == pytest.approx(expected, rel=1e-5, abs=1e-6), (name, i, until)
                turned = [X @ X.T for X in map(leading, (momentum_of(of_matrix[:2]), M))]
                if until == 4 and len(of_G) > 2:
                    assert found["subspace_change_left"] == pytest.approx(
                        np.linalg.norm(turned[0] - turned[1], 2), abs=1e-6
                    )


def leading(X: np.ndarray) -> np.ndarray:
    return np.linalg.svd(X)[0][:, :2]


def test_averages_of_polar_factors_are_read_where_they_are_kept_and_momentum_where_it_is() -> None:
    for case, kept in {"NAMO": "alignment_momentum", "post": "alignment_polar_average", "none": None}.items():
        of_tall = alone(case, Odd)[0]["tall.layer.weight"]
        found = {key for key in NUMBERS if key.startswith("alignment") and key in of_tall}
        assert found == {"alignment_gradient", kept} - {None}
        assert any(key.startswith("filter_ratio") for key in of_tall) == (case == "NAMO")
        assert ("sigma_momentum_q50" in of_tall) == (kept is not None)


def with_missing_and_nan(rank: int, layout: str) -> Any:
    kind, wrap = LAYOUTS[layout]
    module = wrap(new_module(kind, torch.float64))
    optimizer = build_optimizer(module, NAMO, blocks=kind.blocks, lr=0.01)
    probe, readings = SpectralProbe(optimizer, ["*tall.layer.weight", "*wide.layer.weight"], rank=2), []
    parameters = {clean_name(name): p for name, p in module.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        module(prescribed_gradients(new_module(kind, torch.float64), step)).backward()
        if (rank == 1 or layout == "fsdp1") and step in (1, 2):  # of the step that is watched, and of the next
            _spoil(parameters["tall.layer.weight" if step == 1 else "wide.layer.weight"])
        if step in (1, 2):
            probe.watch()
        optimizer.step()
        if (taken := probe.take()) is not None:
            readings.append({clean_name(name): spectra.numbers() for name, spectra in taken[1].items()})
    return readings


def _spoil(parameter: Tensor) -> None:
    if parameter.grad is not None:  # FSDP1: this rank has a part
        local_tensor(parameter.grad).fill_(math.nan)


@pytest.mark.parametrize("layout", ["fsdp2-uneven", "fsdp1"])
def test_a_nan_costs_the_readings_of_its_matrix_only(layout: str) -> None:
    first, second = run_ranks(with_missing_and_nan, 2, layout)
    assert first == second
    spoiled, after = first
    whole = {"sigma_gradient_q50", "sigma_momentum_q50", "alignment_momentum", "orthogonality_error"}
    assert spoiled["wide.layer.weight"].keys() & whole == whole - {"alignment_momentum"}  # its next gradient is NaN
    of_tall = spoiled["tall.layer.weight"].keys()
    assert of_tall & whole == {"sigma_momentum_q50", "alignment_momentum"}  # the momentum stayed as it was
    assert after["tall.layer.weight"].keys() >= whole
    assert after["wide.layer.weight"].keys() & whole == {"sigma_momentum_q50", "alignment_momentum"}
