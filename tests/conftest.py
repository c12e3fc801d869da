"""What all tests share: the dtype of the iteration, and a line about the machine's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from iteration import ITERATIONS, iterating_in


@pytest.fixture(params=ITERATIONS)
def iteration(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each dtype of the iteration; gives its name."""
    with iterating_in(request.param):
        yield request.param


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say it in a line of its own: with -q, as in pyproject.toml, pytest prints no header."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # the workers of xdist have none
        from lightning_namo.orthogonalize import iteration_dtype

        with iterating_in(None):
            dtype = iteration_dtype("cpu")
        reporter.write_line(f"Newton-Schulz on this CPU iterates in {str(dtype).removeprefix('torch.')} by itself.")
