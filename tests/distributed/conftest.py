"""What the tests of whole jobs share: a folder with the token files, and a run that nothing interrupts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.job import STEPS, losses, run_job, succeed


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The parameters of the module's tests that are to be run (see -k and -m): what others need is left out."""
    items = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params if hasattr(item, "callspec") else {} for item in items]


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    """A working directory with the token files in data/sotu."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run on one node with two processes under DDP."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "data").symlink_to(data)
    succeed(run_job(folder))
    return folder


@pytest.fixture(scope="session")
def uninterrupted(whole_run: Path) -> dict[int, float]:
    """Its losses by step."""
    curve = losses(whole_run)
    assert len(curve) == STEPS
    return curve
