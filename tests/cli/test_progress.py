"""Progress bars of commands: seen on a terminal, and not elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
import yaml

from lightning_namo import progress
from lightning_namo.gpt2.data import documents, openwebtext, tokenize
from lightning_namo.gpt2.data.encoding import Encoder, train_tokenizer
from lightning_namo.progress import progress_bar
from tests.helpers.forked import run_python
from tests.helpers.gpt2 import contents, saved
from tests.helpers.text import TEXTS, write_jsonl, write_parquet

PROGRAM = """
import os, sys
from pathlib import Path
from lightning_namo.atomic_io import write_json
from lightning_namo.cli import entry_point, sweep
from lightning_namo.gpt2.data import documents, openwebtext, tokenize

terminal, *command = sys.argv[1:]
if terminal:
    os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), 2)
documents.SPAN, tokenize.PART = 300, 1000
openwebtext.download, openwebtext.DOCUMENTS = lambda *_: [Path("texts.parquet").resolve()], 60
sweep._do = lambda run, out_dir, *_: write_json(out_dir / run.name / sweep.RESULT, {"val/loss": 1.0})
entry_point.main(command)
"""

LITDATA = (pytest.mark.skipif(importlib.util.find_spec("litdata") is None, reason="needs litdata"), pytest.mark.slow)
WRITING = ("Encoding: 100%", "Writing train.bin: 100%", "Checking train.bin: 100%")
PREPARE = "prepare --inputs+ texts.jsonl --vocab_size 300 --out_dir"
COMMANDS = {  # what is shown, by command; the last argument is a new path
    PREPARE: ("Reading: 100%", "Training the tokenizer: 100%", *WRITING),
    "prepare openwebtext --tokenizer tokenizer.json --num_proc 1 --out_dir": WRITING,
    "prepare chunks --data_dir tokens --chunk_tokens 640 --out_dir": ("Progress: 100%",),
    "consolidate sharded.ckpt --out": ("Reading sharded.ckpt: 100%", "Writing new: +[1-9]"),
    "export lone.ckpt --out_dir": ("Exporting: 100%",),
    "sweep": ("Sweep:  50%",),  # before the second run
}
EACH = [pytest.param(name, marks=LITDATA if "chunks" in name else ()) for name in COMMANDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "texts", TEXTS)
    write_parquet(folder / "texts", TEXTS)
    train_tokenizer(TEXTS, 300).save(str(folder / "tokenizer.json"))
    (folder / "tokens").mkdir()
    for name in ("train", "val"):
        np.arange(3000, dtype="<u2").tofile(folder / "tokens" / f"{name}.bin")
    checkpoint = contents()
    saved(folder / "lone.ckpt", checkpoint)
    dcp.save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=folder / "sharded.ckpt", no_dist=True)
    saved(folder / "sharded.ckpt" / "meta.pt", checkpoint)
    return folder


def run(command: str, folder: Path, target: Path, terminal: str = "") -> subprocess.CompletedProcess[str]:
    if command == "sweep":
        grid = {"base": [], "out_dir": str(target), "grids": [{"values": {"lr": [1, 2]}}]}
        (first := target / "lr=1").mkdir(parents=True)
        (first / "result.json").write_text('{"val/loss": 2.0}')
        target = target / "sweep.yaml"
        target.write_text(yaml.safe_dump(grid))
    return run_python(["-c", PROGRAM, terminal, *command.split(), str(target)], folder, TQDM_DELAY="0")


def run_on_terminal(command: str, folder: Path, target: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """What a command did, and what it wrote to standard error, which is a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(read_terminal, ours)
        try:
            done = run(command, folder, target, os.ttyname(its))
        finally:
            os.close(its)
    os.close(ours)
    return done, shown.result()


def read_terminal(ours: int) -> str:
    content = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while block := os.read(ours, 2**16):
            content += block
    return content.decode()


@pytest.mark.parametrize("command", EACH)
def test_a_command_shows_its_progress_on_a_terminal(command: str, folder: Path, tmp_path: Path) -> None:
    done, shown = run_on_terminal(command, folder, tmp_path / "new")
    assert json.loads(done.stdout)
    assert [bar for bar in COMMANDS[command] if not re.search(bar, shown)] == [], shown
    assert "Writing model shards" not in shown  # transformers'


@pytest.mark.parametrize("command", EACH)
def test_a_command_shows_no_progress_where_there_is_no_terminal(command: str, folder: Path, tmp_path: Path) -> None:
    done = run(command, folder, tmp_path / "new")
    assert json.loads(done.stdout)
    assert "%|" not in done.stderr


@pytest.mark.slow
def test_several_processes_advance_one_bar(folder: Path, tmp_path: Path) -> None:
    done, shown = run_on_terminal(PREPARE.replace("--out_dir", "--num_proc 2 --out_dir"), folder, tmp_path / "new")
    assert json.loads(done.stdout)
    assert "Encoding:   0%" in shown
    assert "Encoding: 100%" in shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_parts_of_an_interrupted_run_are_shown_as_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "SPAN", 300)
    monkeypatch.setattr(tokenize, "PART", 3000)
    parts = tokenize.gather_parts(documents.scan([folder / "texts.jsonl"], "text"))
    job = tokenize.Job(tmp_path, Encoder(train_tokenizer(TEXTS, 300), "own"), documents.choose(60, 0.1, 0), "text")
    assert sum(job.encode(parts[0])) == pytest.approx(parts[0].size)
    monkeypatch.setenv("TQDM_DELAY", "0")
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    tokenize.encode_parts(job, parts, num_proc=1)
    assert "Encoding: 100%" in shown.getvalue()
    assert "Encoding:   0%" not in shown.getvalue()


def test_bars_wait_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with progress_bar("Writing", "B", total=2) as bar:
        assert bar.delay == 2
        assert not bar.disable
    assert shown.getvalue() == ""


@pytest.mark.parametrize("variable", ["TQDM_DELAY", "TQDM_DISABLE"])
def test_what_the_environment_says_for_all_bars_is_heeded(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tqdm", dict)
    name = variable.removeprefix("TQDM_").lower()
    assert name in progress_bar("Writing", "B", total=2)
    monkeypatch.setenv(variable, "1")
    assert name not in progress_bar("Writing", "B", total=2)  # so that tqdm takes it from there


def test_a_download_shows_no_progress_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def snapshot_download(*_: Any, tqdm_class: Any, **__: Any) -> str:
        return str(tmp_path / "".join(tqdm_class("12", desc="Fetching 2 files")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert openwebtext.download("out", 0.1, 0) == []
    assert capsys.readouterr().err == ""
