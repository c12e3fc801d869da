"""The command line: Lightning's own with a section for the optimizer, and commands that need no Trainer."""

from lightning_namo.cli.entry_point import main
from lightning_namo.cli.lightning_cli import NamoCLI

__all__ = ["NamoCLI", "main"]
