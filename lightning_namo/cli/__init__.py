"""The command line: Lightning's own with a section for the optimizer, and commands that need no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_namo.cli.lightning_cli import NamoCLI

__all__ = ["NamoCLI", "main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line: see `lightning_namo.cli.entry_point.main`.

    Lightning is imported here, and not by the processes that `prepare` starts, which import the program anew.
    """
    from lightning_namo.cli import entry_point

    entry_point.main(args)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "NamoCLI":
            from lightning_namo.cli.lightning_cli import NamoCLI

            return NamoCLI
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
