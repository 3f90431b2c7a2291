from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ldm import files
from ldm.files import atomic_write, write_text
from ldm.util import UserError


def test_writes_and_makes_parents(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b.txt", "été")
    assert path.read_text(encoding="utf-8") == "été"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_old_file_stays_when_writing_fails(tmp_path: Path, code: int) -> None:
    path = write_text(tmp_path / "x.pt", "old")

    def half_then_fail(file) -> None:
        file.write(b"ne")
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"x\.pt.*(disk is full|error)"):
        atomic_write(path, half_then_fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_nothing_is_left_when_the_writer_is_interrupted(tmp_path: Path) -> None:
    def interrupted(file) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x.pt", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="not a folder|exists"):
        write_text(tmp_path / "f" / "x", "")


def test_file_has_ordinary_permissions(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x", "")
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()
