"""Documents in .txt, .jsonl and .parquet files: where they are, and those of any span, read one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_namo.progress import progress_bar

SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS = ".txt, .jsonl or .parquet"
SPAN = 2**22  # bytes of a .jsonl file in a span
STRINGS = ("string", "large_string", "string_view")  # Arrow's types of text
ROWS = 1024  # of a .parquet file to hold at a time


@dataclass(frozen=True)
class Span:
    """Consecutive documents of a file, which can be read without those before.

    Attributes:
        file: A .txt file, which is one document; a .jsonl or .parquet file.
        start: Byte of a .jsonl file or row group of a .parquet file to start with.
        stop: Byte or row group to stop before.
        documents: How many there are.
        size: Bytes of text, about.
    """

    file: Path
    start: int
    stop: int
    documents: int
    size: int


@dataclass(frozen=True)
class Split:
    """Which documents are held out for validation.

    Attributes:
        held_out: Their numbers.
        alone: The fraction at its end to hold out of the only document; 0 if there are more.
    """

    held_out: frozenset[int]
    alone: float = 0.0

    def divide(self, number: int, text: str) -> list[tuple[str, str]]:
        """Return the text of a document with "train" or "val"; of the only document, both parts of it."""
        if not self.alone:
            return [("val" if number in self.held_out else "train", text)]
        cut = len(text) - max(1, round(len(text) * self.alone))
        if cut == 0:
            raise ValueError(f"Expected a document long enough to divide for validation. Got {text!r} as the only one.")
        return [("train", text[:cut]), ("val", text[cut:])]


def choose(count: int, val_fraction: float, seed: int) -> Split:
    """Choose documents to hold out, at least one and not all.

    The same as `datasets.Dataset.train_test_split`, hence as nanoGPT's prepare.py, with the same seed.

    Args:
        count: How many documents there are.
        val_fraction: Fraction of them to hold out; of a single document, the fraction at its end.
        seed: Seed of the choice.
    """
    if count == 1:
        return Split(frozenset(), val_fraction)
    held_out = min(math.ceil(count * val_fraction), count - 1)
    return Split(frozenset(np.random.default_rng(seed).permutation(count)[:held_out].tolist()))


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Return the files of `SUFFIXES` among the inputs and in the folders among them, in a fixed order."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise ValueError(f"Expected {KINDS} files in the folder {path}. Got none.")
            files += found
        elif not path.is_file():
            raise ValueError(f"Expected a file or a folder. Got {path}, which does not exist.")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"Expected a {KINDS} file. Got {path}.")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"Expected at least one {KINDS} file. Got none.")
    return files


def scan(files: list[Path], text_key: str) -> Iterator[Span]:
    """Yield the spans of files, with a progress bar.

    Text is read to the end, as far as it is in .txt and .jsonl files, and only counted in .parquet files.

    Raises:
        ValueError: A file without text or that cannot be read; the message says where.
    """
    with progress_bar("Reading", "B", sum(path.stat().st_size for path in files if path.suffix != ".parquet")) as bar:
        for path in files:
            found = False
            for span in _SCANS[path.suffix](path, text_key):
                found = True
                yield span
                bar.update(0 if path.suffix == ".parquet" else span.size)
            if not found:
                raise ValueError(f"Expected text in {path}. Got an empty file.")


def read(spans: Iterable[Span], text_key: str) -> Iterator[tuple[float, str]]:
    """Yield the documents of spans, each with its size, the mean of its span. Those of a .parquet file may be blank."""
    for span in spans:
        for text in _read(span, text_key):
            yield span.size / span.documents, text


def _read(span: Span, text_key: str) -> Iterator[str]:
    if span.file.suffix == ".txt":
        yield _txt(span.file)
    elif span.file.suffix == ".jsonl":
        yield from (text for _, text in _jsonl(span.file, text_key, span.start, span.stop))
    else:
        yield from _parquet(span, text_key)


def _scan_txt(path: Path, text_key: str) -> Iterator[Span]:
    _txt(path)
    size = path.stat().st_size
    yield Span(path, 0, size, 1, size)


def _scan_jsonl(path: Path, text_key: str) -> Iterator[Span]:
    start = stop = documents = 0
    for stop, _ in _jsonl(path, text_key, 0, path.stat().st_size):
        documents += 1
        if stop - start >= SPAN:
            yield Span(path, start, stop, documents, stop - start)
            start, documents = stop, 0
    if documents:
        yield Span(path, start, stop, documents, stop - start)


def _scan_parquet(path: Path, text_key: str) -> Iterator[Span]:
    file = open_parquet(path)
    schema = file.schema_arrow
    if text_key not in schema.names or str(schema.field(text_key).type) not in STRINGS:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"Expected a column {text_key!r} of strings in {path}. Got {columns}.")
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_key)
        if group.num_rows:
            yield Span(path, number, number + 1, group.num_rows, size)


_SCANS = {".txt": _scan_txt, ".jsonl": _scan_jsonl, ".parquet": _scan_parquet}


def _txt(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 in {path}. Got {error}.") from error
    return _checked(text, str(path))


def _jsonl(path: Path, text_key: str, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Yield the text of each line that is not blank, with the byte after the line."""
    after = f" after byte {start}" if start else ""
    with path.open("rb") as file:
        file.seek(start)
        number = 0
        while start < stop and (line := file.readline()):
            start, number = start + len(line), number + 1
            if line.strip():
                yield start, _text_of(line, text_key, f"{path}, line {number}{after}")


def _text_of(line: bytes, text_key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"Expected a JSON object in {where}. Got {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        got = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"Expected an object with a string under {text_key!r} in {where}. Got {got}.")
    return _checked(record[text_key], where)


def _checked(text: str, where: str) -> str:
    if not text.strip():
        raise ValueError(f"Expected text in {where}. Got none.")
    return text


def open_parquet(path: Path) -> Any:
    """Return the file as a `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: There is no pyarrow, or the file is not whole.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"Expected pyarrow, to read {path}: pip install 'lightning-namo[data]'.") from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a whole parquet file. Got {path}: {error}") from error


def _parquet(span: Span, text_key: str) -> Iterator[str]:
    file = open_parquet(span.file)
    groups = list(range(span.start, span.stop))
    for batch in file.iter_batches(ROWS, row_groups=groups, columns=[text_key], use_threads=False):
        yield from (text or "" for text in batch.column(0).to_pylist())
