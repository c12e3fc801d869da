"""Recipes by name: the files of configs, in the wheel or in the checkout that this is installed from."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_OPTIONS = ("--config", "-c")


def recipes(name: str | None = None, out: str | None = None) -> str:
    """List the recipes, a line each, or copy one to edit.

    Args:
        name: The one to copy, such as quickstart or optim/namo_d.
        out: The file to write; by default the recipe's own name in the current folder. It must not be there.

    Returns:
        The list, or the file that was written.

    Raises:
        ValueError: No recipe of that name, a file without a name, or one that is there.
    """
    found = by_name()
    if name is None:
        if out is not None:
            raise ValueError(f"Expected the name of the recipe to copy to {out}. Got none: {', '.join(found)}.")
        return "\n".join(_listed(found))
    source = Path(recipe(name))
    target = Path(out or source.name)
    if target.exists():
        raise ValueError(f"Expected the name of a new file. Got {target}; give another with --out.")
    shutil.copyfile(source, target)
    return str(target)


def _listed(found: Mapping[str, Path]) -> Iterator[str]:
    """Recipes, sweeps and layers, each kind under the command that it is for."""
    kinds = {
        "Recipes: lightning-namo fit --config NAME": [name for name in found if "/" not in name],
        "Layers, over a recipe: lightning-namo fit --config RECIPE --config NAME": [
            name for name in found if "/" in name and not name.startswith("sweeps/")
        ],
        "Sweeps: lightning-namo sweep NAME": [name for name in found if name.startswith("sweeps/")],
    }
    width = max(map(len, found))
    for title, names in kinds.items():
        yield title
        yield from (f"  {name:{width}}  {_sentence(found[name])}" for name in names)


def by_name() -> dict[str, Path]:
    """The files of all recipes and layers by their names, such as optim/namo_d; the recipes first."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (path.parent != folder, path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def recipe(value: str) -> str:
    """The file of a recipe by its name; a file that is there, YAML and addresses stay as they are.

    Raises:
        ValueError: What is none of these; the message has the nearest names.
    """
    if os.path.exists(value) or not re.fullmatch(r"[\w.\-/\\]+", value):
        return value
    found = by_name()
    name = value.removesuffix(".yaml")
    if name in found:
        return str(found[name])
    tails = {key.rpartition("/")[2]: key for key in found}
    close = difflib.get_close_matches(name.rpartition("/")[2], tails, n=3, cutoff=0.4)
    nearest = f" Nearest: {', '.join(tails[tail] for tail in close)}." if close else ""
    raise ValueError(
        f"Expected a file, or the name of a recipe. Got {value!r}.{nearest} `lightning-namo recipes` lists them."
    )


def with_files(arguments: Sequence[str]) -> Iterator[str]:
    """Command-line arguments with files in place of the names of recipes."""
    is_config = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if is_config:
            yield recipe(argument)
        elif equals and option in _OPTIONS:
            yield f"{option}={recipe(value)}"
        else:
            yield argument
        is_config = argument in _OPTIONS


def _sentence(path: Path) -> str:
    """The first sentence of a file's comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines[:4] if line.startswith("#"))
    return textwrap.shorten(re.split(r"\.\s", comment)[0], 110, placeholder=" ...")
