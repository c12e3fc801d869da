"""The program: it starts as a module, finds the user's own modules, and lets their bugs through."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_namo.cli import main
from tests.helpers.command_line import OWN, QUIET
from tests.helpers.forked import run_python

MODEL = """
import torch
from lightning_namo.gpt2.module import GPT2Module

class MyModel(GPT2Module):
    def on_train_start(self):
        print("trains", __file__)
"""
OPTIONS = ["--model.n_layer=1", "--model.n_head=1", "--model.n_embd=8", "--data.block_size=8", "--data.batch_size=2"]
OPTIONS += [
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
]
OPTIONS += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]


pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")


def test_the_module_runs_as_the_console_script_does() -> None:
    done = run_python(["-m", "lightning_namo", "--help"])
    assert done.returncode == 0
    assert "lightning-namo" in done.stdout


def test_a_bug_in_the_user_s_module_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a bug of the user's own"):
        main(["fit", *QUIET, *OWN, "--trainer.max_steps=1"])


@pytest.mark.parametrize("module", ["mycli", "examples.train_fabric"])
def test_fit_finds_a_module_in_the_current_folder_and_no_example_of_ours_in_its_place(
    module: str, tmp_path: Path, data: Path
) -> None:
    (tmp_path / "data").symlink_to(data)
    file = (tmp_path / Path(*module.split("."))).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(MODEL, encoding="utf-8")
    script = str(Path(sys.executable).parent / "lightning-namo")
    done = run_python([script, "fit", f"--model={module}.MyModel", *OPTIONS], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"trains {file}" in done.stdout
