"""The embedded corpus: US State of the Union addresses, 1934 to 2021. See LICENSE.md."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

CORPUS_FILE = Path(__file__).with_name("sotu.jsonl.gz")
CORPUS_SHA256 = "7fd9eab0377db1b2e9c3ef592a615d7c6f19ccb12b351931e4e442d19c37b178"
"""SHA-256 of the committed file."""

FIRST_VALIDATION_YEAR = 2015


def load_speeches(path: Path = CORPUS_FILE) -> tuple[list[str], list[str]]:
    """Read the speeches, oldest first.

    Args:
        path: The committed file.

    Returns:
        The speeches to train on, 1934 to 2014, and those to validate on, 2015 to 2021.

    Raises:
        ValueError: The file is not the one that was committed.
    """
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != CORPUS_SHA256:
        raise ValueError(
            f"Expected {path} with SHA-256 {CORPUS_SHA256}. Got {digest}. Install the"
            " package again, or make the file with `python -m lightning_namo.gpt2.data.corpus.build`."
        )
    train: list[str] = []
    validation: list[str] = []
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        speech = json.loads(line)
        year = int(speech["name"][:4])
        (train if year < FIRST_VALIDATION_YEAR else validation).append(speech["text"])
    return train, validation
