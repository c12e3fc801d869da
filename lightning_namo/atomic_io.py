"""Files and folders that are there whole or not at all, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_namo.progress import counted

BLOCK = 2**20  # bytes to read at a time


def check_output(path: Path, overwrite: bool) -> None:
    """Raise a ValueError if something is where a command is to write, unless it may overwrite that."""
    if path.exists() and not overwrite:
        raise ValueError(f"Expected a new path to write to. Got {path}, which exists. To replace it: --overwrite true")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; when it is complete it replaces what was there.

    Until then its name starts with a dot. After an error nothing is replaced. A link is replaced, and not what it
    points to.

    Args:
        path: Of the file or folder; folders above it are made.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        yield new
        if path.is_dir():  # which a rename does not replace
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        for leftover in (new, old):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            leftover.unlink(missing_ok=True)


def blocks(path: Path) -> Iterator[bytes]:
    """Yield what a file holds, block by block."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits, with a progress bar."""
    digest = hashlib.sha256()
    for block in counted(blocks(path), len, f"Checking {path.name}", "B", path.stat().st_size):
        digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file says; None if it is missing, cut short or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
