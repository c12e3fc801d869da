"""The program: it starts as a module, and lets bugs of the user's own through."""

from __future__ import annotations

import pytest

from lightning_namo.cli import main
from tests.helpers.command_line import OWN, QUIET
from tests.helpers.forked import run_python

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")


def test_the_module_runs_as_the_console_script_does() -> None:
    done = run_python(["-m", "lightning_namo", "--help"])
    assert done.returncode == 0
    assert "lightning-namo" in done.stdout


def test_a_bug_in_the_user_s_module_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a bug of the user's own"):
        main(["fit", *QUIET, *OWN, "--trainer.max_steps=1"])
