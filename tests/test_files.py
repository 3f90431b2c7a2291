from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ldm import files
from ldm.files import (
    atomic_write,
    content_kind,
    file_hash,
    file_kind,
    images_fingerprint,
    is_address,
    no_address,
    why_unreadable,
    write_text,
)
from ldm.util import UserError


def test_write_text_creates_parent_folders(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b.txt", "été")
    assert path.read_text(encoding="utf-8") == "été"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.one_reader
def test_what_is_no_file_is_named_and_a_run_folder_names_its_file(tmp_path: Path) -> None:
    assert why_unreadable("https://a.b/c.pt") == "is a web address; download the file and name it"
    assert why_unreadable(tmp_path / "gone") == "does not exist; check the path"
    assert why_unreadable("/dev/null") == "is not an ordinary file; name a file on disk"
    assert why_unreadable(tmp_path) == "is a folder; name the file in it"
    write_text(tmp_path / "checkpoints" / "embeddings.pt", "x")
    for folder in (tmp_path, tmp_path / "checkpoints"):
        assert (
            why_unreadable(folder)
            == f"is a folder; name the file in it, '{tmp_path}/checkpoints/embeddings.pt'"
        )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_old_file_is_kept_if_writing_fails(tmp_path: Path, code: int) -> None:
    path = write_text(tmp_path / "x.pt", "old")

    def half_then_fail(file) -> None:
        file.write(b"ne")
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"x\.pt.*(disk is full|error)"):
        atomic_write(path, half_then_fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x.pt", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, lambda file: file.write(b"text"))
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_name_with_a_null_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="null character"):
        write_text(tmp_path / "a\0b", "x")


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="not a folder|exists"):
        write_text(tmp_path / "f" / "x", "")


def test_files_have_default_permissions(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x", "")
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_hashes_and_fingerprints(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert file_hash(d) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert images_fingerprint([a, b]) == images_fingerprint([b, c]) != images_fingerprint([a, c])
    assert len(images_fingerprint([a])) == 16
    with pytest.raises(UserError, match="cannot be read"):
        file_hash(tmp_path / "absent")


SAFETENSORS = (16).to_bytes(8, "little") + b"{}" + b" " * 14


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (SAFETENSORS, "safetensors"),
        (b"PK\x03\x04\x00\x00\x00\x00{", "safetensors"),  # a header of 64 MB
        (b"PK\x03\x04\x00\x00\x00\x00\x00", "zip"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"\x89PNG\r\n\x1a\n....", "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8L", "image"),
        (b"RIFF\x00\x00\x00\x00WAVE", "unknown"),
        (b"", "empty"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "web page"),
        (b"\n <?xml version='1.0'?>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b'{"a": 1}', "JSON"),
        (b"abcdefgh{ text }", "text"),
        (b"\xff\xfe\x00\x01", "unknown"),
    ],
)
def test_the_kind_of_a_file_is_recognised_by_its_first_bytes(tmp_path: Path, head: bytes, kind: str) -> None:
    assert content_kind(head) == kind
    (tmp_path / "x.png").write_bytes(head + bytes(600) if kind == "safetensors" else head)
    assert file_kind(tmp_path / "x.png") == kind


def test_the_kind_of_a_path_that_is_not_a_file(tmp_path: Path) -> None:
    assert file_kind(tmp_path) == "folder" and file_kind(tmp_path / "absent") == "missing"
    os.mkfifo(tmp_path / "pipe")
    assert file_kind(tmp_path / "pipe") == "special"


def test_what_is_written_often_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    write_text(tmp_path / "status.json", "one", sync=False)
    path = write_text(tmp_path / "status.json", "two", sync=False)
    assert path.read_text() == "two" and [*tmp_path.iterdir()] == [path] and not synced
    write_text(path, "three")
    assert len(synced) == 1


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://huggingface.co/me/toy", "name the hub id me/toy"),
        ("https://www.HuggingFace.co/me/toy/resolve/main/a.safetensors", "name the hub id me/toy"),
        ("hf://me/toy.v2", "name the hub id me/toy.v2"),
        ("http://hf.co/datasets/me/toy", "name a hub id as OWNER/NAME"),
        ("https://x.org/a/b.ckpt", "name a hub id as OWNER/NAME"),
        ("s3://bucket/a.ckpt", "name a hub id as OWNER/NAME"),
    ],
)
def test_a_web_address_names_its_hub_id(address: str, named: str) -> None:
    for source in (address, Path(address)):  # a path has lost one of the slashes
        assert is_address(source)
        assert (
            no_address(source) == f"'{address}' is a web address; {named}, or download the file and name it"
        )


def test_paths_are_no_addresses() -> None:
    for path in ("C:/models/a.ckpt", "me/toy", "a:b/c", "./x", "/x/y.pt"):
        assert not is_address(path)
