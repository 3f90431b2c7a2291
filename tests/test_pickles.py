from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from ldm import pickles
from ldm.pickles import PickleError


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path: Path, legacy: bool) -> None:
    bait, file = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"a": torch.ones(1), "b": Evil(bait)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PickleError, match="evil.pt.*refused.*(posix|nt).system"):
        pickles.load(file)
    assert not bait.exists()


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    bait, file = tmp_path / "ran", tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps(Evil(bait)))
    with pytest.raises(PickleError):
        pickles.load(file)
    assert not bait.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (os.urandom(3000), "damaged"),
    ],
)
def test_files_that_are_not_pickles_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "x.ckpt"
    file.write_bytes(content)
    with pytest.raises(PickleError, match=words) as error:
        pickles.load(file)
    assert "x.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(4000)}, file)
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(PickleError, match="damaged"):
        pickles.load(file)


def test_only_named_classes_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(torch.nn.ParameterDict({"a": torch.ones(2)}), file)
    with pytest.raises(PickleError, match="ParameterDict"):
        pickles.load(file)
    assert torch.equal(pickles.load(file, classes=[torch.nn.ParameterDict])["a"], torch.ones(2))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PickleError, match="does not exist"):
        pickles.load(tmp_path / "no.pt")
    with pytest.raises(PickleError, match="folder"):
        pickles.load(tmp_path)
