"""Who may import whom: only downwards, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_namo"

# From the papers up to the command line. A module imports those to the left of it in its row and those in rows above.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "workspace", "rules", "orthogonalize", "ranges", "regions"),
    ("agreement", "plan", "exchange", "grid", "adamw", "param_groups", "checkpoint", "adoption", "trained_module"),
    ("grouped", "base", "optimizers", "schedules"),
    (
        "factory",
        "callbacks",
        "clipping",
        "run_card",
        "consolidate",
        "gpt2",
        "gpt2.corpus",
        "gpt2.corpus.build",
        "gpt2.files",
        "gpt2.documents",
        "gpt2.encoding",
        "gpt2.parts",
        "gpt2.prepare",
        "gpt2.openwebtext",
        "gpt2.loaders",
        "gpt2.data",
        "gpt2.streaming",
        "gpt2.model",
        "gpt2.parallel",
        "gpt2.module",
        "gpt2.summary",
        "gpt2.trained",
        "gpt2.export",
        "estimate",
        "forecast",
        "gpt2.generate",
    ),
    ("", "checks", "sweep", "cli", "__main__"),  # "": the package itself, which gathers the public names
)
LAYER = {module: number for number, row in enumerate(LAYERS) for module in row}
PLACE = {module: place for place, module in enumerate(module for row in LAYERS for module in row)}

LIGHTNING_FROM = 3
DISTRIBUTED_IN = {"regions", "trained_module", "exchange", "checkpoint", "consolidate", "gpt2.parallel"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """Every name that a module imports, dotted: of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if name.removeprefix("lightning_namo.") in MODULES]
            yield from submodules or [node.module, *names]


def ours(source: str) -> set[str]:
    """The package's own modules among the imports."""
    found = {name for name in imports(source) if name.split(".")[0] == "lightning_namo"}
    return {name.removeprefix("lightning_namo").removeprefix(".") for name in found} & set(MODULES)


def complaints(module: str, source: str) -> list[str]:
    """What a module imports and must not."""
    found = [f"imports {other or 'the package'}" for other in sorted(ours(source)) if PLACE[other] >= PLACE[module]]
    if module == "exchange" and "rules" in ours(source):
        found.append("imports rules")
    names = set(imports(source))
    if LAYER[module] < LIGHTNING_FROM:
        found += sorted(f"imports {name}" for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning"))
    if module not in DISTRIBUTED_IN:
        found += sorted(f"imports {name}" for name in names if f"{name}.".startswith("torch.distributed."))
    return found


def test_every_module_has_a_layer() -> None:
    assert sorted(set(MODULES) - set(LAYER)) == [], "give the new module a place in LAYERS"


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda module: module or "package")
def test_imports_point_downwards(module: str) -> None:
    assert complaints(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rules", "from lightning_namo.exchange import Exchange"),
        ("exchange", "from lightning_namo import rules"),
        ("base", "def step():\n    from lightning_namo.callbacks import OptimizerCallback"),
        ("base", "from lightning_namo import NAMO"),
        ("optimizers", "import lightning.pytorch as pl"),
        ("schedules", "from lightning import Callback"),
        ("optimizers", "import torch.distributed as dist"),
        ("param_groups", "from torch.distributed.tensor import DTensor"),
        ("callbacks", "from torch import distributed"),
        ("gpt2.model", "from lightning_namo.gpt2.module import GPT2Module"),
        ("regions", "import lightning_namo.rules\nfrom lightning_namo.regions import Span"),
    ],
)
def test_an_import_that_points_upwards_is_seen(module: str, source: str) -> None:
    assert complaints(module, source)


def test_rules_and_exchange_know_nothing_of_each_other_even_indirectly() -> None:
    def reach(module: str) -> set[str]:
        below = ours(MODULES[module].read_text(encoding="utf-8")) - {module}
        return below.union(*(reach(other) for other in below))

    assert "exchange" not in reach("rules")
    assert "rules" not in reach("exchange")
