"""Files that appear whole or not at all, and hashes of files."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from ldm.util import UserError

_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder; name a file",
}


def atomic_write(path: str | Path, writer: Callable[[BinaryIO], object]) -> Path:
    """Write a file beside its place, sync it and rename it: a reader sees the old file or the new one.

    `writer` receives a binary file. Parent folders are made. Raises UserError that names the path and the
    remedy; the old file then stays as it was.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': {_REMEDY.get(error.errno or 0, error.strerror or error)}"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """`write_whole` for UTF-8 text."""
    return atomic_write(path, lambda file: file.write(text.encode()))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal; its first ten digits are the hash that model browsers show."""
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"'{path}': cannot be read ({error.strerror or error})") from error


def images_fingerprint(paths: Iterable[str | Path]) -> str:
    """16 hexadecimal digits that depend on the contents of the files, and not on their names or order."""
    hashes = sorted(file_hash(path) for path in paths)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
