"""The routes of models of transformers are those of the committed tables, which were reviewed line by line.

After a change that is meant: ``python -m tests.routing.test_architectures`` writes them again; read the diff.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import transformers

from lightning_namo.routing.split import split_parameters
from tests.helpers.paths import ROOT
from tests.routing.architectures import ARCHITECTURES, table

FOLDER = ROOT / "tests" / "data" / "routes"
VERSION = "5.23"  # of transformers, whose modules change their names


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"


@pytest.mark.skipif(
    not transformers.__version__.startswith(VERSION), reason=f"the tables are of transformers {VERSION}"
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_routes_are_those_that_were_reviewed(name: str) -> None:
    reviewed, found = path_of(name).read_text(encoding="utf-8"), table(split_parameters(ARCHITECTURES[name]()))
    changed = difflib.unified_diff(reviewed.splitlines(), found.splitlines(), "reviewed", "found", lineterm="", n=0)
    assert not list(changed), "\n".join(
        difflib.unified_diff(reviewed.splitlines(), found.splitlines(), lineterm="", n=0)
    )


def test_every_table_is_of_a_model_that_is_tested() -> None:
    assert len(ARCHITECTURES) >= 30
    assert {path.stem for path in FOLDER.iterdir()} == set(ARCHITECTURES)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for model, make in ARCHITECTURES.items():
        path_of(model).write_text(table(split_parameters(make())), encoding="utf-8")
