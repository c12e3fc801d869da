"""Parsers whose errors name the options that are nearest to a misspelt one."""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
from typing import Any, NoReturn

from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_namo.cli.commands import COMMANDS

_SUBCOMMAND = re.compile(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)")
_OF_CLASS = re.compile(r"Option '([\w.]+)' is not accepted.*class_path='([\w.]+)'", re.DOTALL)


class _Suggesting(ArgumentParser):  # type: ignore[misc, unused-ignore]
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, in words of ours where an option is unknown."""
        if message.startswith("unrecognized arguments: "):
            unknown = message.partition(": ")[2].split()[0].partition("=")[0]
            message += nearest(unknown, [option for option in self._option_string_actions if option.startswith("--")])
        elif found := _SUBCOMMAND.match(message):
            known = [*re.findall(r"\w+", found[2]), *(name.partition(" ")[0] for name in COMMANDS)]
            super().error(f"Expected a command. Got {found[1]}.{nearest(found[1], known)}", ex)
        elif (found := _OF_CLASS.search(message)) and isinstance(cls := pydoc.locate(found[2]), type):
            known = [name for name in inspect.signature(cls).parameters if name != "params"]
            section = message.partition('"')[2].partition('"')[0]
            super().error(
                f"Expected an option of {found[2]} under {section}. Got {found[1]}.{nearest(found[1], known)}", ex
            )
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


def nearest(name: str, known: list[str]) -> str:
    """A sentence with the names that are nearest to one; nothing where none is near."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" Nearest: {', '.join(close)}." if close else ""
