"""From text to `train.bin` and `val.bin` (raw uint16 token ids, nanoGPT's format), with `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightning_namo.arguments import COUNT, COUNT_OR_ZERO, OPEN_UNIT, check_ranges
from lightning_namo.atomic_io import read_json, replacing, sha256, write_json
from lightning_namo.gpt2.data.corpus import CORPUS_SHA256, load_speeches
from lightning_namo.gpt2.data.documents import Split, choose, find_files, read, scan
from lightning_namo.gpt2.data.encoding import (
    END_OF_TEXT,
    Encoder,
    load_encoder,
    load_tokenizer,
    pieces,
    train_tokenizer,
)
from lightning_namo.gpt2.data.tokenize import Job, Part, clear, encode_parts, gather_parts, is_folder_of, open_folder
from lightning_namo.progress import counted, progress_bar

__all__ = ["END_OF_TEXT", "SPEECHES_VOCAB_SIZE", "load_tokenizer", "prepare", "prepare_speeches", "train_tokenizer"]

SPEECHES_VOCAB_SIZE = 4096
"""Vocabulary of the tokenizer for the embedded corpus."""

FILES = ("tokenizer.json", "train.bin", "val.bin")

RANGES = {"vocab_size": COUNT, "val_fraction": OPEN_UNIT, "seed": COUNT_OR_ZERO, "num_proc": COUNT}


def prepare(
    inputs: list[str],
    out_dir: str,
    text_key: str = "text",
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    num_proc: int = 1,
) -> dict[str, Any]:
    """Turn text files into token files to train on.

    A .txt file is one document, a .jsonl file one document a line, a .parquet file one a row. Documents are held out
    for validation by chance; of a single document it is the end. Each ends with ``<|endoftext|>``. An interrupted run
    leaves finished parts in the folder `partial` of `out_dir`, and the same command goes on with them.

    Args:
        inputs: Files (.txt, .jsonl, .parquet) and folders, which are searched for such files; UTF-8.
        out_dir: Folder for train.bin, val.bin, tokenizer.json and meta.json; made if it is not there.
        text_key: Key of the text in a line of a .jsonl file, column of the text in a .parquet file.
        vocab_size: Vocabulary of the byte-level BPE trained on the training documents, 257 to 65,536 tokens.
        tokenizer: What to use instead of training one: "gpt2" for GPT-2's, which is downloaded once; a folder with
            its encoder.json and vocab.bpe; or a tokenizer.json (of the `tokenizers` library).
        val_fraction: Fraction of the documents, or of the only document, held out for validation, in (0, 1).
        seed: Seed of the choice of the documents held out.
        num_proc: Processes that encode. The files do not depend on it.

    Returns:
        What meta.json says: the vocabulary, the numbers of tokens and documents, SHA-256 of the files, the source.

    Raises:
        ValueError: Numbers out of range, a file that is missing, unreadable or without text, a line without the key, a
            vocabulary that does not fit into uint16 or is not to be had. The message names file and line.
    """
    check_ranges(locals(), "prepare", RANGES)
    files = find_files(inputs)
    return prepare_files(
        files,
        Path(out_dir),
        text_key=text_key,
        tokenizer=vocab_size if tokenizer is None else load_encoder(tokenizer),
        val_fraction=val_fraction,
        seed=seed,
        num_proc=num_proc,
        origin={"files": [str(file) for file in files]},
    )


def prepare_files(
    files: list[Path],
    folder: Path,
    *,
    text_key: str,
    tokenizer: Encoder | int,
    val_fraction: float,
    seed: int,
    num_proc: int,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Turn files into token files, unless the very same are there already.

    Args:
        files: Files of documents, in the order of the documents.
        folder: Folder for the token files.
        text_key: Key or column of the text.
        tokenizer: The encoder, or the vocabulary of a byte-level BPE to train on the training documents.
        val_fraction: Fraction of the documents held out for validation, in (0, 1).
        seed: Seed of the choice of the documents held out.
        num_proc: Processes that encode.
        origin: What meta.json says about the files.
    """
    name = f"trained, {tokenizer} tokens" if isinstance(tokenizer, int) else tokenizer.name
    settings = {"text_key": text_key, "tokenizer": name, "val_fraction": val_fraction, "seed": seed}
    manifest: dict[str, Any] = {
        "files": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "settings": settings,
        "tokenizer": None if isinstance(tokenizer, int) else _digest(tokenizer.tokenizer.to_str()),
    }
    source = origin | settings | {"key": _digest(json.dumps(manifest))}
    if is_current(folder, source):
        print(f"The token files in {folder} are of these files and settings already.", file=sys.stderr)
        return dict(read_json(folder / "meta.json"))
    parts = gather_parts(scan(files, text_key))
    split = choose(sum(part.documents for part in parts), val_fraction, seed)
    partial = folder / "partial"
    manifest["parts"] = [part.first for part in parts]
    if isinstance(tokenizer, int):
        kept = _kept_tokenizer(partial, manifest)
        tokenizer = Encoder(kept or train_tokenizer(_training_text(parts, split, text_key), tokenizer), name)
    open_folder(partial, manifest)
    _write_tokenizer(partial, tokenizer.tokenizer)
    job = Job(partial, tokenizer, split, text_key)
    documents = encode_parts(job, parts, num_proc)
    if not all(documents.values()):
        raise ValueError(f"Expected text to train on and text to validate on. Got {documents}, blank ones aside.")
    ids = {name: _with_bar(job, parts, name) for name in documents}
    meta = _write(folder, tokenizer, ids, source, {f"{part}_documents": count for part, count in documents.items()})
    clear(partial)
    return meta


def prepare_speeches(folder: Path) -> None:
    """Write the token files of the embedded corpus, unless the very same are there already.

    Files of another version, changed files and files of an interrupted run are made anew.
    """
    source = {"corpus_sha256": CORPUS_SHA256, "vocab_size": SPEECHES_VOCAB_SIZE}
    if is_current(folder, source):
        return
    train, validation = load_speeches()
    write_dataset(folder, train_tokenizer(train, SPEECHES_VOCAB_SIZE), train, validation, source)


def write_dataset(
    folder: Path,
    tokenizer: Tokenizer,
    train: Iterable[str],
    validation: Iterable[str],
    source: dict[str, Any],
) -> dict[str, Any]:
    """Write the token files of documents that are at hand."""
    encoder = Encoder(tokenizer, "trained")
    documents = {"train": train, "val": validation}
    ids = {name: (ids for text in texts for _, ids in encoder.encode(text)) for name, texts in documents.items()}
    return _write(folder, encoder, ids, source, {})


def is_current(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder holds finished, unchanged token files made from this source."""
    try:
        meta = read_json(folder / "meta.json")
        return bool(meta["source"] == source and meta["sha256"] == {name: sha256(folder / name) for name in FILES})
    except (OSError, KeyError, TypeError):  # missing, cut short, or of another kind
        return False


def _write(
    folder: Path, encoder: Encoder, ids: Mapping[str, Iterable[bytes]], source: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Write the token files, each whole or not at all, and last meta.json, the mark of a finished folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    _write_tokenizer(folder, encoder.tokenizer)
    meta: dict[str, Any] = {"tokenizer": encoder.name, "vocab_size": encoder.tokenizer.get_vocab_size()}
    for name, chunks in ids.items():
        with replacing(folder / f"{name}.bin") as temporary, temporary.open("wb") as file:
            file.writelines(chunks)
            meta[f"{name}_tokens"] = file.tell() // 2
    meta |= more | {"sha256": {name: sha256(folder / name) for name in FILES}, "source": source}
    write_json(folder / "meta.json", meta)
    return meta


def _training_text(parts: list[Part], split: Split, text_key: str) -> Iterator[str]:
    """Yield the training documents piece by piece, with a progress bar of all documents."""
    spans = (span for part in parts for span in part.spans)
    with progress_bar("Training the tokenizer", "B", sum(part.size for part in parts)) as bar:
        for number, (size, text) in enumerate(read(spans, text_key)):
            for name, share in split.divide(number, text):
                for piece in pieces(share):
                    if name == "train":
                        yield piece
                    bar.update(size * len(piece) / len(text))


def _with_bar(job: Job, parts: list[Part], name: str) -> Iterator[bytes]:
    """Yield the ids of finished parts, with a progress bar."""
    total = sum(job.path(part, name).stat().st_size for part in parts)
    return counted(job.ids(parts, name), len, f"Writing {name}.bin", "B", total)


def _kept_tokenizer(partial: Path, manifest: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that an interrupted run trained."""
    file = partial / "tokenizer.json"
    return load_tokenizer(file) if is_folder_of(partial, manifest) and file.is_file() else None


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    with replacing(folder / "tokenizer.json") as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
