"""Files of documents: of every kind, and which documents are held out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_namo.gpt2.data import documents
from lightning_namo.gpt2.data.encoding import Encoder
from lightning_namo.gpt2.data.prepare import prepare
from tests.helpers.text import TEXTS, ids_of, tokens_in, write_jsonl, write_parquet


def write_txt(path: Path, texts: list[str | None]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03d}.txt").write_bytes((text or "").encode())


Write = Callable[[Path, list[str | None]], None]


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet])
def test_every_kind_of_file_gives_the_same_tokens(write: Write, vocabulary: str, gpt2: Encoder, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "texts", TEXTS)
    out = tmp_path / "out"
    meta = prepare([str(tmp_path / "in")], str(out), tokenizer=vocabulary, val_fraction=0.1, seed=3)
    held_out = documents.choose(60, 0.1, 3).held_out
    assert len(held_out) == 6
    for name in ("train", "val"):
        chosen = [text for number, text in enumerate(TEXTS) if (number in held_out) == (name == "val")]
        assert tokens_in(out, name) == [token for text in chosen for token in ids_of(gpt2, text)]
        assert (meta[f"{name}_documents"], meta[f"{name}_tokens"]) == (len(chosen), len(tokens_in(out, name)))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_blank_rows_of_a_parquet_file_are_left_out(vocabulary: str, gpt2: Encoder, tmp_path: Path) -> None:
    write_parquet(tmp_path / "texts", ["one", None, " \n", "two", "", "three"] * 5)
    meta = prepare([str(tmp_path / "texts.parquet")], str(tmp_path), tokenizer=vocabulary, val_fraction=0.3)
    ids = tokens_in(tmp_path, "train") + tokens_in(tmp_path, "val")
    assert sorted(ids) == sorted(token for text in ["one", "two", "three"] * 5 for token in ids_of(gpt2, text))
    assert meta["train_documents"] + meta["val_documents"] == 15


def test_only_blank_rows_are_refused(vocabulary: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "texts", ["one", None])
    with pytest.raises(ValueError, match=r"Expected text to train on and text to validate on. Got .*: 0"):
        prepare([str(tmp_path / "texts.parquet")], str(tmp_path / "out"), tokenizer=vocabulary)
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (
            TEXTS,
            "body",
            r"Expected a column 'body' of strings in .*texts.parquet. Got meta \(struct<.*, text \(string\)",
        ),
        (TEXTS, "meta", r"Expected a column 'meta' of strings in .*texts.parquet"),
        ([], "text", r"Expected text in .*texts.parquet. Got an empty file"),
        (None, "text", r"Expected a whole parquet file. Got .*texts.parquet: "),
    ],
)
def test_wrong_parquet_files_are_refused(
    content: list[str | None] | None, key: str, message: str, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "texts", content or [])
    file = tmp_path / "texts.parquet"
    if content is None:
        file.write_bytes(file.read_bytes()[:-9])  # an interrupted download
    with pytest.raises(ValueError, match=message):
        prepare([str(file)], str(tmp_path / "out"), text_key=key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "fraction", "seed"), [(2, 0.9, 0), (60, 0.1, 3), (1000, 0.0005, 2357), (7, 0.3, 5)])
def test_the_documents_held_out_are_those_of_nanogpt(count: int, fraction: float, seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    numbers = datasets.Dataset.from_dict({"number": range(count)})
    if count == 2:
        fraction = 0.5  # all but one is the most
    theirs = numbers.train_test_split(test_size=fraction, seed=seed, shuffle=True)["test"]["number"]
    assert documents.choose(count, fraction, seed).held_out == frozenset(theirs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", r"Expected a file or a folder. Got .*x.txt, which does not exist"),
        ("x.csv", b"1,2", r"Expected a .txt, .jsonl or .parquet file. Got .*x.csv"),
        ("x.txt", b" \n", r"Expected text in .*x.txt. Got none"),
        ("x.txt", b"\xff\xfe\xfa", r"Expected UTF-8 in .*x.txt"),
        ("x.jsonl", b"\n", r"Expected text in .*x.jsonl. Got an empty file"),
        ("x.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', r"'text' in .*x.jsonl, line 3. Got the keys \['txt'\]"),
        ("x.jsonl", b'{"text": 7}', r"'text' in .*x.jsonl, line 1"),
        ("x.jsonl", b"[1]", r"'text' in .*x.jsonl, line 1. Got list"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ""}', r"Expected text in .*x.jsonl, line 2. Got none"),
        ("x.jsonl", b'{"text": "a"}\n{"text', r"Expected a JSON object in .*x.jsonl, line 2"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "x.txt")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([str(path)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
