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


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_link_is_replaced_and_what_it_points_to_stays(folder: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere", tmp_path / "link"
    target.mkdir() if folder else target.write_text("old")
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.mkdir() if folder else temporary.write_text("new")
    assert not link.is_symlink()
    assert link.is_dir() == target.is_dir() == folder
    assert folder or (target.read_text(), link.read_text()) == ("old", "new")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


def test_a_folder_stays_where_nothing_was_written_in_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(folder):
        pass
    assert (folder / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["export"]
