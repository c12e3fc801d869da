"""Parsers whose errors name the options that are nearest to a misspelt one."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import pydoc
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_namo.cli.commands import COMMANDS

_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)")
_OF_CLASS = (  # how jsonargparse words it, in which order option and class stand
    re.compile(r"Problem with given class_path '(?P<path>[\w.]+)':\s+Option '(?P<option>[\w.]+)' is not accepted"),
    re.compile(r"Option '(?P<option>[\w.]+)' is not accepted.*class_path='(?P<path>[\w.]+)'", re.DOTALL),
)
_KEY = re.compile(r'Parser key "([\w.]+)"')
_OURS = re.compile(r"Expected an option of .*? under (.*)")


class _Suggesting(ArgumentParser):  # type: ignore[misc, unused-ignore]
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, in words of ours where an option is unknown."""
        key = found[1] if (found := _KEY.match(message)) else ""
        if message.startswith("unrecognized arguments: "):
            unknown = message.partition(": ")[2].split()[0].partition("=")[0]
            message += "." + _nearest_option(
                unknown, [name for name in self._option_string_actions if name[:2] == "--"]
            )
        elif found := _SUBCOMMAND.match(message):
            known = [*re.findall(r"\w+", found[2]), *(name.partition(" ")[0] for name in COMMANDS)]
            super().error(f"Expected a command. Got {found[1]}.{nearest(found[1], known)}", ex)
        elif key and (found := _OURS.search(message)):  # of a parser within: a section of a section
            super().error(found[0].replace(" under ", f" under {key}.", 1), ex)
        elif found := next(filter(None, (form.search(message) for form in _OF_CLASS)), None):
            path, option = found["path"], found["option"]
            if option != "class_path" and (names := _arguments(pydoc.locate(path))) is not None:
                super().error(f"Expected an option of {path} under {key}. Got {option}.{nearest(option, names)}", ex)
        super().error(message, ex)


class RunParser(_Suggesting, LightningArgumentParser):
    """Of `fit` and Lightning's other subcommands."""


class CommandParser(_Suggesting):
    """Of the commands that need no Trainer."""


class RecipeParser(CommandParser):
    """Takes configs of `fit`, of which it leaves out the options that only a run needs."""

    ONLY_FOR_RUNS = ("seed_everything", "ckpt_path", "weights_only")

    def __init__(self, *args: Any, prog: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, prog=prog, **kwargs)
        for key in self.ONLY_FOR_RUNS if prog else ():  # the parsers of the classes in a config have none
            self.add_argument(f"--{key}", type=Any, help=SUPPRESS)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse as usual."""
        parsed = super().parse_args(*args, **kwargs)
        for key in self.ONLY_FOR_RUNS:
            parsed.pop(key, None)
        return parsed


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence with the names that are nearest to one; nothing where none is near."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f" Nearest: {', '.join(close)}." if close else ""


def _nearest_option(unknown: str, options: Sequence[str]) -> str:
    """Those of the same section; a long common beginning would make all options of it near."""
    section, _, name = unknown.rpartition(".")
    inside = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, inside, n=3, cutoff=0.6)
    return f" Nearest: {', '.join(inside[each] for each in close)}." if close else nearest(unknown, options)


def _arguments(cls: Any) -> list[str] | None:
    """The named arguments of a class, beside an optimizer's params; None of what is not a class."""
    if not isinstance(cls, type):
        return None
    with contextlib.suppress(ValueError):
        named = inspect.signature(cls).parameters.values()
        return [p.name for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "params"]
    return []
