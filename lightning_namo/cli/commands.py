"""Commands that need no Trainer, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_namo.checkpoint.consolidate import consolidate
from lightning_namo.cli.recipes import recipes
from lightning_namo.cli.routes import routes
from lightning_namo.cli.sweep import sweep
from lightning_namo.gpt2.data.openwebtext import openwebtext
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.data.streaming import chunks
from lightning_namo.gpt2.export import export
from lightning_namo.gpt2.generate import generate
from lightning_namo.planning.report import plan
from lightning_namo.report.page import report

PROGRAM = "lightning-namo"
COMMANDS: dict[str, Callable[..., Any]] = {
    "plan": plan,
    "prepare": prepare,
    "prepare openwebtext": openwebtext,
    "prepare chunks": chunks,
    "export": export,
    "consolidate": consolidate,
    "generate": generate,
    "recipes": recipes,
    "routes": routes,
    "sweep": sweep,
    "report": report,
}
"""Commands beside Lightning's. Their parameters are options; what they return is printed."""

LEADING = {
    **dict.fromkeys(("export", "consolidate", "generate"), "ckpt_path"),
    "sweep": "file",
    "routes": "model",
    "recipes": "name",
}
"""The option that a value without a name, right after the command, belongs to."""

LEADING_LISTS = {"report": "runs"}
"""The same of commands that take several values there."""

OF_RECIPES = ("plan", "routes")
"""Commands that take configs of `fit`."""
