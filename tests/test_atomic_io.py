"""Files that take their places only when they are complete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_namo.atomic_io import replacing


def test_a_file_takes_its_place_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "whole.ckpt"

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(path.parent) == []
    for text in ("half", "whole"):
        with replacing(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "whole"
