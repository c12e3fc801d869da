"""The program: `lightning-namo`, its errors and its end."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_namo.cli.commands import COMMANDS, LEADING, LEADING_LISTS, OF_RECIPES, PROGRAM
from lightning_namo.cli.lightning_cli import NamoCLI
from lightning_namo.cli.parsers import CommandParser, RecipeParser
from lightning_namo.cli.recipes import by_name, recipe, with_files
from lightning_namo.sharding.process_group import initialized, leave


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; wrong input ends it with one message and exit code 2.

    Args:
        args: The arguments after the program's name; None: this process's own.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())  # as for `python -m`: classes of the user's are named by their module
    warnings.filterwarnings("default", "lightning_namo", DeprecationWarning)  # of former paths in a config
    theirs, failed = initialized(), True
    try:
        arguments = list(with_files(arguments))
        # the longest, as `prepare openwebtext` is one too
        name = max((name for name in COMMANDS if arguments[: len(name.split())] == name.split()), key=len, default=None)
        if name is not None:
            options = arguments[len(name.split()) :]
            if name in LEADING and options and not options[0].startswith("-"):
                is_recipe = name in OF_RECIPES and (options[0].endswith((".yaml", ".yml")) or options[0] in by_name())
                options = [
                    f"--config={recipe(options[0])}" if is_recipe else f"--{LEADING[name]}={options[0]}",
                    *options[1:],
                ]
            if values := list(itertools.takewhile(lambda option: name in LEADING_LISTS and option[:1] != "-", options)):
                options = [f"--{LEADING_LISTS[name]}", json.dumps(values), *options[len(values) :]]
            result = auto_cli(
                COMMANDS[name],
                args=options,
                as_positional=False,
                prog=f"{PROGRAM} {name}",
                usage=f"{PROGRAM} {name} {_leading(name)}[--OPTION VALUE]",
                parser_class=RecipeParser if name in OF_RECIPES else CommandParser,
            )
            print(result if isinstance(result, str) else json.dumps(result, indent=2))
        else:
            NamoCLI(arguments)
        failed = False
    except (ValueError, FileNotFoundError, MisconfigurationException) as error:
        complaint = _complaint(error)
        if complaint is None:
            raise
        print(f"{PROGRAM}: error: {complaint}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if not theirs:
            leave(failed)


def _leading(name: str) -> str:
    """What stands right after a command, in its usage."""
    key = LEADING.get(name) or LEADING_LISTS.get(name)
    if key is None:
        return ""
    word = key.upper() + " ..." * (name in LEADING_LISTS)
    required = inspect.signature(COMMANDS[name]).parameters[key].default is inspect.Parameter.empty
    return f"{word} " if required else f"[{word}] "


def _complaint(error: BaseException) -> str | None:
    """What this package or Lightning says of a wrong input, somewhere in a chain of errors; None: not about input."""
    link: BaseException | None = error
    while link is not None:
        frames = [frame for frame, _ in traceback.walk_tb(link.__traceback__)]
        package = str(frames[-1].f_globals.get("__name__")).partition(".")[0] if frames else ""
        about_input = isinstance(link, ValueError | FileNotFoundError | MisconfigurationException)
        if about_input and package in ("lightning_namo", "lightning"):
            return str(link)
        link = link.__cause__ or link.__context__
    return None
