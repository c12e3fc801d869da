"""Files that are there whole or not at all, and what they hold."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 2**20  # bytes to read at a time


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place only when it is complete; until then its name starts with a dot."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def blocks(path: Path) -> Iterator[bytes]:
    """Yield what a file holds, block by block."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    for block in blocks(path):
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
    with atomic(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode("utf-8"))
