"""From text to `train.bin` and `val.bin` (raw uint16 token ids, nanoGPT's format), with `tokenizer.json`."""

import hashlib
import json
import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_namo.gpt2.corpus import CORPUS_SHA256, load_speeches
from lightning_namo.types import NonNegativeInt, OpenUnitInterval, PositiveInt

END_OF_TEXT = "<|endoftext|>"
"""Ends every document, if the tokenizer has this token."""

SPEECHES_VOCAB_SIZE = 4096
"""Vocabulary of the tokenizer for the embedded corpus."""

MAX_VOCAB_SIZE = 2**16  # ids 0 to 65,535
MIN_VOCAB_SIZE = 256 + 1  # every byte, and END_OF_TEXT
PIECE = 2**20  # characters to encode at a time, as an encoding takes far more memory than its text
SUFFIXES = (".txt", ".jsonl")
FILES = ("tokenizer.json", "train.bin", "val.bin")


def prepare(
    inputs: list[str],
    out_dir: str,
    text_key: str = "text",
    vocab_size: PositiveInt = 4096,
    tokenizer: str | None = None,
    val_fraction: OpenUnitInterval = 0.05,
    seed: NonNegativeInt = 0,
) -> dict[str, Any]:
    """Turn text files into token files to train on.

    A .txt file is one document, a .jsonl file one document a line. Documents are held out for validation by
    chance; of a single document it is the end.

    Args:
        inputs: Files (.txt, .jsonl) and folders, which are searched for such files; UTF-8.
        out_dir: Folder for train.bin, val.bin, tokenizer.json and meta.json; made if it is not there.
        text_key: Key of the text in a line of a .jsonl file.
        vocab_size: Vocabulary of the byte-level BPE trained on the training documents, 257 to 65,536 tokens.
        tokenizer: A tokenizer.json (of the `tokenizers` library) to use instead of training one.
        val_fraction: Fraction of the documents, or of the only document, held out for validation, in (0, 1).
        seed: Seed of the choice of the documents held out.

    Returns:
        What meta.json says: the vocabulary, the numbers of tokens, SHA-256 of the files, the source.

    Raises:
        ValueError: A file that is missing, unreadable or without text, a line without the key, a vocabulary
            that does not fit into uint16. The message names file and line.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"Expected val_fraction in (0, 1). Got {val_fraction}.")
    files = find_files(inputs)
    train, validation = split_documents(lambda: read_documents(files, text_key), val_fraction, seed)
    encoder = train_tokenizer(train(), vocab_size) if tokenizer is None else load_tokenizer(Path(tokenizer))
    source = {"files": [str(file) for file in files], "val_fraction": val_fraction, "seed": seed}
    return write_dataset(Path(out_dir), encoder, train(), validation(), source)


def prepare_speeches(folder: Path) -> None:
    """Write the token files of the embedded corpus, unless the very same are there already.

    Files of another version, changed files and files of an interrupted run are made anew.
    """
    source = {"corpus_sha256": CORPUS_SHA256, "vocab_size": SPEECHES_VOCAB_SIZE}
    if is_current(folder, source):
        return
    train, validation = load_speeches()
    write_dataset(folder, train_tokenizer(train, SPEECHES_VOCAB_SIZE), train, validation, source)


def find_files(inputs: Iterable[str]) -> list[Path]:
    """Return the .txt and .jsonl files among the inputs and in the folders among them, in a fixed order."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not found:
                raise ValueError(f"Expected .txt or .jsonl files in the folder {path}. Got none.")
            files += found
        elif not path.is_file():
            raise ValueError(f"Expected a file or a folder. Got {path}, which does not exist.")
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"Expected a .txt or .jsonl file. Got {path}.")
        else:
            files.append(path)
    if not files:
        raise ValueError("Expected at least one .txt or .jsonl file. Got none.")
    return files


def read_documents(files: Iterable[Path], text_key: str) -> Iterator[str]:
    """Yield one document of each .txt file and of each line of a .jsonl file, blank lines aside."""
    for path in files:
        empty = True
        for where, text in _read_jsonl(path, text_key) if path.suffix == ".jsonl" else _read_txt(path):
            if not text.strip():
                raise ValueError(f"Expected text in {where}. Got none.")
            empty = False
            yield text
        if empty:
            raise ValueError(f"Expected text in {path}. Got an empty file.")


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    try:
        yield str(path), path.read_bytes().decode("utf-8")  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 in {path}. Got {error}.") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"Expected a JSON object in {where}. Got {error}.") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                got = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"Expected an object with a string under {text_key!r} in {where}. Got {got}.")
            yield where, record[text_key]


def split_documents(
    read: Callable[[], Iterator[str]], val_fraction: float, seed: int
) -> tuple[Callable[[], Iterator[str]], Callable[[], Iterator[str]]]:
    """Divide documents into those to train on and those to validate on, without holding them in memory.

    Args:
        read: Starts a new pass over the documents.
        val_fraction: Fraction of the documents to hold out; of a single document, the fraction at its end.
        seed: Seed of the choice.

    Returns:
        Two functions, each of which starts a new pass over its part. Neither part is empty.
    """
    count = sum(1 for _ in read())
    if count == 1:
        text = next(read())
        cut = len(text) - max(1, round(len(text) * val_fraction))
        if cut == 0:
            raise ValueError(f"Expected a text that can be divided. Got {text!r} as the only one.")
        return lambda: iter([text[:cut]]), lambda: iter([text[cut:]])
    held_out = min(max(1, round(count * val_fraction)), count - 1)
    chosen = frozenset(random.Random(seed).sample(range(count), held_out))
    return (
        lambda: (text for i, text in enumerate(read()) if i not in chosen),
        lambda: (text for i, text in enumerate(read()) if i in chosen),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019, section 2.2); the same texts give the same tokenizer.

    Raises:
        ValueError: A vocabulary outside 257 to 65,536.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"Expected vocab_size from {MIN_VOCAB_SIZE} (all bytes) to {MAX_VOCAB_SIZE} (which fits uint16)."
            f" Got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json whose ids fit into uint16."""
    if not path.is_file():
        raise ValueError(f"Expected a tokenizer.json. Got {path}, which does not exist.")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > MAX_VOCAB_SIZE:
        raise ValueError(
            f"Expected a vocabulary of at most {MAX_VOCAB_SIZE} tokens, which is what fits into uint16."
            f" Got {tokenizer.get_vocab_size()} in {path}."
        )
    return tokenizer


def write_dataset(
    folder: Path,
    tokenizer: Tokenizer,
    train: Iterable[str],
    validation: Iterable[str],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Write the token files, each whole or not at all, and last meta.json, the mark of a finished folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    with _atomic(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode("utf-8"))
    meta: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    for name, documents in (("train", train), ("val", validation)):
        with _atomic(folder / f"{name}.bin") as file:
            for ids in _encode(documents, tokenizer):
                file.write(ids)
            meta[f"{name}_tokens"] = file.tell() // 2
    meta |= {"sha256": {name: _sha256(folder / name) for name in FILES}, "source": source}
    with _atomic(folder / "meta.json") as file:
        file.write((json.dumps(meta, indent=2) + "\n").encode("utf-8"))
    return meta


def is_current(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder holds finished, unchanged token files made from this source."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        digests = {name: _sha256(folder / name) for name in FILES}
        return bool(meta["source"] == source and meta["sha256"] == digests)
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut short, or of another kind
        return False


def _encode(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[bytes]:
    """Yield the ids of the documents piece by piece, `END_OF_TEXT` after each document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    for text in documents:
        for start in range(0, len(text), PIECE):
            ids = tokenizer.encode(text[start : start + PIECE], add_special_tokens=False).ids
            yield np.array(ids, dtype="<u2").tobytes()
        if end is not None:
            yield np.array([end], dtype="<u2").tobytes()


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place only when it is complete."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
