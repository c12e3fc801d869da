"""The dtype of the iteration: the device's own, or the environment variable's."""

import subprocess
import sys

import pytest
import torch

import lightning_namo
from lightning_namo import NAMO, orthogonalize
from lightning_namo.polar.iteration_dtype import ITERATION_DTYPE, _fastest_dtype, iteration_dtype
from lightning_namo.torch_versions import cpu_multiplies_bfloat16
from tests.helpers.iteration import iterating_in
from tests.helpers.matrices import matrix


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_a_cpu_iterates_in_bfloat16_where_it_has_the_instructions(monkeypatch, capabilities, expected):
    """What the CPU can do is stood in for: there is one CPU here."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.delenv(ITERATION_DTYPE, raising=False)
    _fastest_dtype.cache_clear()
    try:
        assert iteration_dtype("cpu") is expected
        X = matrix(64, 128)
        assert torch.equal(orthogonalize(X), orthogonalize(X, dtype=expected))
    finally:
        _fastest_dtype.cache_clear()


@pytest.mark.parametrize("has", [True, False])
def test_a_torch_that_does_not_list_capabilities_is_asked_for_avx512_bf16(monkeypatch, has):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert cpu_multiplies_bfloat16() is has


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_environment_variable_overrules_every_device(iteration, device):
    assert iteration_dtype(device) is getattr(torch, iteration)


def test_matrices_are_iterated_in_the_dtype_of_the_environment_variable_unless_they_are_given_one(iteration):
    X, dtype = matrix(24, 48), getattr(torch, iteration)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert torch.equal(orthogonalize(X), orthogonalize(X, dtype=dtype))
    assert not torch.equal(orthogonalize(X), orthogonalize(X, dtype=other))
    with iterating_in(None):
        assert torch.equal(orthogonalize(X, dtype=dtype), orthogonalize(X, dtype=iteration_dtype("cpu"))) == (
            iteration_dtype("cpu") == dtype
        )


# Of the package only what is asked, as all of it imports Lightning, which takes seconds.
PROGRAM = f"""
import sys, types
package = sys.modules["lightning_namo"] = types.ModuleType("lightning_namo")
package.__path__ = {lightning_namo.__path__}
from lightning_namo.polar.iteration_dtype import iteration_dtype
print(iteration_dtype("cpu"))
"""


@pytest.mark.slow
def test_processes_that_are_started_inherit_the_environment_variable(iteration):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == f"torch.{iteration}"


@pytest.mark.parametrize("value", ["fp32", "torch.float32", "float64", "FLOAT32", " "])
def test_another_value_of_the_environment_variable_is_refused_in_words(value):
    message = rf"Expected .* {ITERATION_DTYPE} to be 'bfloat16' or 'float32', or not to be set. Got '{value}'."
    with iterating_in(value), pytest.raises(ValueError, match=message):
        orthogonalize(matrix(3, 5))
    optimizer = NAMO([torch.nn.Parameter(matrix(3, 5))])
    with iterating_in(value), pytest.raises(ValueError, match=message):
        optimizer.step()  # without a gradient: on every rank, whatever it owns
