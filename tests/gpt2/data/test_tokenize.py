"""Parts that are encoded in several processes, and what an interrupted run leaves."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_namo.gpt2.data import documents, tokenize
from lightning_namo.gpt2.data.encoding import Encoder
from lightning_namo.gpt2.data.prepare import prepare
from tests.helpers.forked import run_python
from tests.helpers.text import TEXTS, write_jsonl, write_parquet

CHILD = """
import os, signal, sys
from concurrent.futures import Future
from lightning_namo.gpt2.data import documents, encoding, tokenize
from lightning_namo.gpt2.data.prepare import prepare

documents.SPAN, tokenize.PART = 300, 1000
cls, method, calls, texts, out, tokenizer, num_proc = sys.argv[1:]
cls, calls = {"Encoder": encoding.Encoder, "Future": Future}[cls], int(calls)
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

    def counted(job: tokenize.Job, part: tokenize.Part) -> Iterator[float]:
        encoded.append(part.number)
        return encode(job, part)

    monkeypatch.setattr(tokenize.Job, "encode", counted)
    return encoded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "calls", "num_proc", "resumed_with", "tokenizer"),
    [("Encoder", 30, 1, 2, "train"), ("Future", 4, 2, 1, "gpt2")],
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
    write_jsonl(tmp_path / "texts", TEXTS)
    inputs, out = str(tmp_path / "texts.jsonl"), tmp_path / "out"
    name = vocabulary if tokenizer == "gpt2" else tokenizer
    method = {"Encoder": "encode", "Future": "result"}[cls]
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

    def encode(self, document: str) -> Iterator[tuple[int, bytes]]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield 0, b""


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_what_to_do(gpt2: Encoder, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts", TEXTS)
    job = tokenize.Job(tmp_path, Killed(gpt2.tokenizer, "gpt2"), documents.choose(60, 0.1, 0), "text")
    plan = tokenize.gather_parts(documents.scan([tmp_path / "texts.jsonl"], "text"))
    with pytest.raises(RuntimeError, match=r"One of them was killed.*: the same command goes on with what is finished"):
        tokenize.encode_parts(job, plan, num_proc=2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_parts_make_no_difference(vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "texts", TEXTS)
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
    write_jsonl(tmp_path / "texts", TEXTS)
    file, out = tmp_path / "texts.jsonl", tmp_path / "out"
    full = tokenize.Job.encode

    def interrupted(job: tokenize.Job, part: tokenize.Part) -> Iterator[float]:
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
    write_jsonl(tmp_path / "texts", TEXTS)
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
