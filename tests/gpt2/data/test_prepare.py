"""The way from text to token files, which are made anew only where they are stale."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from lightning_namo.gpt2.data.corpus import CORPUS_SHA256, load_speeches
from lightning_namo.gpt2.data.encoding import END_OF_TEXT, train_tokenizer
from lightning_namo.gpt2.data.prepare import SPEECHES_VOCAB_SIZE, is_current, prepare, prepare_speeches, write_dataset
from tests.helpers.text import TEXT, TEXTS, UNICODE, write_parquet


@pytest.mark.parametrize(("missing", "message"), [("tiktoken", "tiktoken"), ("pyarrow.parquet", "pyarrow")])
def test_a_missing_extra_is_named(
    missing: str, message: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "texts", TEXTS)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"Expected {message}, .* pip install 'lightning-namo\[data\]'"):
        prepare([str(tmp_path / "texts.parquet")], str(tmp_path / "out"), tokenizer=vocabulary)


def test_the_token_files_hold_the_speeches(speeches: Path) -> None:
    meta = json.loads((speeches / "meta.json").read_text())
    tokenizer = Tokenizer.from_file(str(speeches / "tokenizer.json"))
    assert meta["vocab_size"] == tokenizer.get_vocab_size() == SPEECHES_VOCAB_SIZE == 4096
    for name, texts in zip(("train", "val"), load_speeches(), strict=True):
        ids = np.fromfile(speeches / f"{name}.bin", dtype="<u2")
        assert len(ids) == meta[f"{name}_tokens"]
        assert ids.max() < 4096
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded == "".join(text + END_OF_TEXT for text in texts)


def test_current_files_are_left_alone(speeches: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in speeches.iterdir()}
    prepare_speeches(speeches)
    assert {path.name: path.stat().st_mtime_ns for path in speeches.iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    ["no_meta", "other_source", "cut_short", "file_missing", pytest.param("one_token_changed", marks=pytest.mark.slow)],
)
def test_stale_files_are_made_anew(speeches: Path, tmp_path: Path, damage: str) -> None:
    for path in speeches.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta, tokens = tmp_path / "meta.json", tmp_path / "train.bin"
    good = tokens.read_bytes()
    if damage == "no_meta":
        meta.unlink()
    elif damage == "other_source":
        meta.write_text(meta.read_text().replace(CORPUS_SHA256, "0" * 64))
    elif damage == "file_missing":
        tokens.unlink()
    else:
        tokens.write_bytes(good[:-2] if damage == "cut_short" else good[:-2] + b"\x07\x00")
    source = {"corpus_sha256": CORPUS_SHA256, "vocab_size": SPEECHES_VOCAB_SIZE}
    assert is_current(speeches, source)
    assert not is_current(tmp_path, source)
    if damage == "one_token_changed":
        prepare_speeches(tmp_path)
        assert tokens.read_bytes() == good
        assert is_current(tmp_path, source)


def test_text_becomes_token_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    documents = [f"Document number {n}. {UNICODE}" for n in range(20)]
    (folder / "a.txt").write_bytes(documents[0].encode())
    (folder / "deeper" / "b.jsonl").write_text("\n\n".join(json.dumps({"body": text}) for text in documents[1:]))
    (folder / "ignored.csv").write_text("1,2")
    meta = prepare([str(folder)], str(tmp_path / "out"), text_key="body", vocab_size=300, val_fraction=0.1)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = {}
    for name in ("train", "val"):
        ids = np.fromfile(tmp_path / "out" / f"{name}.bin", dtype="<u2")
        assert len(ids) == meta[f"{name}_tokens"]
        texts[name] = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(END_OF_TEXT)[:-1]
    assert len(texts["val"]) == 2
    assert sorted(texts["train"] + texts["val"]) == sorted(documents)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    prepare([str(tmp_path / "one.txt")], str(tmp_path), vocab_size=300, val_fraction=0.25)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    head, tail = (
        tokenizer.decode(np.fromfile(tmp_path / f"{name}.bin", dtype="<u2").tolist()) for name in ("train", "val")
    )
    assert head + tail == TEXT
    assert len(tail) == len(TEXT) // 4


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    given = tmp_path / "given.json"
    train_tokenizer([UNICODE], 280).save(str(given))
    meta = prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), tokenizer=str(given))
    assert meta["vocab_size"] == Tokenizer.from_file(str(given)).get_vocab_size()
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == json.loads(given.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 65_537}, "257 .* to 65536 .* Got 65537"),
        ({"vocab_size": 256}, "Got 256"),
        ({"val_fraction": 1.0}, r"val_fraction to be in \(0, 1\) but got 1.0"),
        ({"tokenizer": "missing.json"}, "Expected a tokenizer.json. Got missing.json, which does not exist"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    (tmp_path / "one.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), **options)  # type: ignore[arg-type]


def test_an_interrupted_run_leaves_no_finished_folder(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    write_dataset(tmp_path, tokenizer, [TEXT], [TEXT], {})

    def interrupted() -> "object":
        yield TEXT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, tokenizer, interrupted(), [TEXT], {})  # type: ignore[arg-type]
    assert not is_current(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "train.bin", "val.bin"]
