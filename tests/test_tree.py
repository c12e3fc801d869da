"""Who may import whom: folders in one direction, files within a folder without circles, read from the source."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder may import those before it, and the modules beside them that know nothing of the package.
FOLDERS = (
    "",
    "polar",
    "sharding",
    "routing",
    "checkpoint",
    "optim",
    "telemetry",
    "integration",
    "testing",
    "gpt2",
    "planning",
    "report",
    "cli",
)
SHARED = {"_moved", "atomic_io", "arguments", "progress", "torch_versions", "workspace"}
LIGHT = FOLDERS[:6]  # know torch only
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lightning_namo").rglob("*.py"))
}


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ([name for name in names if name in MODULES] or [str(node.module)])


def folder(module: str) -> str:
    place = module.split(".")[1:2]
    return "" if not place or place[0] in SHARED else place[0]


def complaints(module: str, source: str) -> list[str]:
    found, own = [], FOLDERS.index(folder(module))
    for name in imports(source):
        if name in MODULES and module != "lightning_namo":  # which gathers the public names
            above = name == "lightning_namo" or FOLDERS.index(folder(name)) > own
            if above and folder(module) != "cli":
                found.append(f"{module} imports {name}")
        elif name.partition(".")[0] in ("lightning", "jsonargparse", "tokenizers") and folder(module) in LIGHT[1:]:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_folders_import_in_one_direction(module: str) -> None:
    assert complaints(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: [i for i in imports(path.read_text("utf-8")) if i in MODULES] for name, path in MODULES.items()}
    public = {name: [] for name, path in MODULES.items() if path.name == "__init__.py"}  # they gather names
    assert list(graphlib.TopologicalSorter(graph | public).static_order())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lightning_namo.polar.cost", "from lightning_namo.sharding import exchange"),
        (
            "lightning_namo.checkpoint.warm_start",
            "def f():\n    from lightning_namo.optim import formulas",
        ),
        ("lightning_namo.optim.engine", "from lightning_namo import NAMO"),
        ("lightning_namo.optim.namo", "import lightning.pytorch as pl"),
        ("lightning_namo.gpt2.module", "from lightning_namo.cli import main"),
    ],
)
def test_an_import_that_points_upwards_is_seen(module: str, source: str) -> None:
    assert complaints(module, source)
