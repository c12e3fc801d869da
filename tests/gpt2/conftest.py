"""Checkpoints of GPT-2s, and token files whose windows start with their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.gpt2 import BLOCK, VAL_WINDOWS, WINDOWS, contents, train_gpt2


@pytest.fixture(scope="session", params=["false", "true"], ids=["no-bias", "bias"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_gpt2(tmp_path_factory.mktemp("run"), f"--model.bias={request.param}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nothing but itself is known of."""
    path = tmp_path_factory.mktemp("lone") / "lone.ckpt"
    torch.save(contents(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, windows in (("train", WINDOWS), ("val", VAL_WINDOWS)):
        np.arange(windows * BLOCK + 1, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    return tmp_path
