"""Commands beside Lightning's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_namo.cli import main
from tests.helpers.command_line import complaint

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")


def test_help_names_lightning_s_commands_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("fit", "validate", "test", "predict", "prepare"))


def test_prepare_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"Document {number} of ten, in a few words."}) for number in range(10)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    main(["prepare", "--inputs+", "documents.jsonl", "--out_dir", "tokens", "--vocab_size", "300"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "tokens" / "meta.json").read_text())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("not json", [], "Expected a JSON object in {path}, line 1"),
        ('{"text": "one"}\n{"content": "two"}', [], "under 'text' in {path}, line 2. Got the keys ['content']"),
        ('{"text": "one"}', ["--val_fraction=1"], "prepare: expected val_fraction to be in (0, 1) but got 1.0"),
        ('{"text": "one"}\n{"text": "two"}', ["--vocab_size=9"], "Expected vocab_size from 257"),
        ('{"text": "one"}', ["--colour=red"], "--colour=red"),
    ],
)
def test_wrong_input_to_prepare_is_one_clear_message(
    content: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text(content)
    arguments = ["prepare", f'--inputs=["{path}"]', "--out_dir=tokens", *options]
    assert message.format(path=path) in complaint(capsys, *arguments)
