"""OpenWebText, all but the download."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lightning_namo.cli import main
from lightning_namo.gpt2.data import openwebtext
from lightning_namo.gpt2.data.prepare import prepare
from tests.helpers.text import TEXTS, write_parquet


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
        write_parquet(file, TEXTS[30 * number :][:30])
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
