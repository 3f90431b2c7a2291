from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.evaluation.concepts import embedding_of
from ldm.util import UserError


def touch(path: Path, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_match_of_a_concepts_name(tmp_path) -> None:
    touch(tmp_path / "bobo_1/checkpoints/embeddings.pt", age=9)
    newest = touch(tmp_path / "bobo_2/checkpoints/embeddings.pt")
    touch(tmp_path / "kiko_3/checkpoints/embeddings.pt")
    assert embedding_of(f"{tmp_path}/{{name}}*/checkpoints/embeddings.pt", "bobo", True) == newest
    assert embedding_of(str(tmp_path), "bobo", True) == newest
    own = touch(tmp_path / "bobo.safetensors", age=99)
    assert embedding_of(f"{tmp_path}/", "bobo", True) == own


def test_one_file_serves_one_concept(tmp_path) -> None:
    file = touch(tmp_path / "own.pt")
    assert embedding_of(str(file), "bobo", False) == file
    with pytest.raises(UserError, match="one file for several concepts; write {name}"):
        embedding_of(str(file), "bobo", True)


def test_a_name_with_wildcards_is_taken_as_it_is(tmp_path) -> None:
    touch(tmp_path / "ab.pt")
    with pytest.raises(UserError, match="no embedding for the concept '\\[a\\]\\*'"):
        embedding_of(f"{tmp_path}/{{name}}.pt", "[a]*", False)
    with pytest.raises(UserError, match="does not exist"):
        embedding_of(str(tmp_path / "absent.pt"), "bobo", False)
