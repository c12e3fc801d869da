"""Checkpoints of GPT-2s that several files read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.gpt2 import contents, train_gpt2


@pytest.fixture(scope="session", params=["false", "true"], ids=["no-bias", "bias"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_gpt2(tmp_path_factory.mktemp("run"), f"--model.bias={request.param}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nothing but itself is known of."""
    path = tmp_path_factory.mktemp("lone") / "lone.ckpt"
    torch.save(contents(), path)
    return path
