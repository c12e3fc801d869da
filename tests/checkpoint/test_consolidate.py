"""`consolidate` on one device: what it refuses. Sharded checkpoints are in tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_namo.checkpoint.consolidate import consolidate
from tests.helpers.gpt2 import contents, refusal, saved


def test_one_file_needs_no_consolidation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved(tmp_path / "lone.ckpt", contents())
    message = refusal(capsys, "consolidate", "--ckpt_path", str(checkpoint), "--out", f"{checkpoint}.whole")
    assert "Expected a sharded checkpoint, which is a folder." in message


def test_consolidate_refuses_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a file to write to. Got .*, which is a folder"):
        consolidate(str(tmp_path / "nowhere"), str(tmp_path), overwrite=True)
