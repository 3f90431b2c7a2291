"""Files: what kind a file is by its first bytes, atomic writing, and hashes."""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from ldm.front_ends import setting
from ldm.util import UserError, shown

FileKind = Literal[
    "safetensors",
    "zip",
    "pickle",
    "image",
    "missing",
    "folder",
    "special",
    "empty",
    "web page",
    "Git LFS pointer",
    "JSON",
    "text",
    "unknown",
]

# The rest of the error message, after the file's name, for a file without tensors.
NO_TENSORS: dict[FileKind, str] = {
    "missing": "does not exist; check the path",
    "folder": "is a folder; name the file in it",
    "special": "is not an ordinary file; name a file on disk",
    "empty": "is empty; it was not written or downloaded completely",
    "web page": "is a web page; download the file itself",
    "Git LFS pointer": "is a Git LFS pointer, not the file; fetch it with 'git lfs pull'",
    "JSON": "is a JSON text file; name the file with the weights",
    "text": "is a text file; name the file with the weights",
}


def file_kind(path: str | Path) -> FileKind:
    """Return what a path leads to; a file's content decides, never its name.

    "zip" is torch.save since torch 1.6, "pickle" torch.save before that, "image" a PNG or WebP. Raises OSError if
    the file cannot be opened.
    """
    path = Path(path)
    if not path.exists():
        return "missing"
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "special"
    with path.open("rb") as file:
        return content_kind(file.read(512))


def why_unreadable(path: str | Path) -> str | None:
    """The rest of the message, after the path, for what is no file of tensors; of a run folder it names its vectors.

    None for a file that may be one.
    """
    if is_address(path):
        return "is a web address; download the file and name it"
    path = Path(path)
    if (kind := file_kind(path)) != "folder":
        return NO_TENSORS.get(kind)
    names = ("embeddings.pt", "checkpoints/embeddings.pt", "learned_embeds.safetensors", "learned_embeds.bin")
    there = next((path / name for name in names if (path / name).is_file()), None)
    return f"is a folder; name the file in it, '{there}'" if there else NO_TENSORS[kind]


# The repository's root, or in an installation what takes its place, and its folders that YAMLs and commands name.
_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = shipped if (shipped := _PACKAGE / "shipped").is_dir() else _PACKAGE.parent
FOLDERS = ("models", "configs", "data")


def in_checkout(path: str, places: Iterable[Path] = ()) -> str:
    """The path, or where it is if it leads nowhere from the working directory.

    It is looked for from each of `places` and from the folders above it, so that a model and its YAML can be used from
    any working directory; then by its last parts in `places`, so that a model's folder can be moved; then, if it begins
    with models/, configs/ or data/, in the checkout.
    """
    with suppress(OSError, ValueError):  # no system has such a name
        if path and not Path(path).exists():
            return next((str(place) for place in _candidates(path, list(places)) if place.exists()), path)
    return path


def _candidates(path: str, places: list[Path]) -> Iterator[Path]:
    for place in places:
        yield from (folder / path for folder in (place.resolve(), *place.resolve().parents))
    parts = Path(path).parts
    for start in range(1, len(parts)):
        yield from (place.resolve().joinpath(*parts[start:]) for place in places)
    if len(parts) > 1 and parts[0] in FOLDERS:
        yield CHECKOUT / path


def content_kind(head: bytes) -> FileKind:
    """Return what a file is by its first bytes; 512 of them are enough."""
    if not head:
        return "empty"
    # The length of the header in 8 bytes, then the header, which is a JSON object. Text is no such length.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**56:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"\x89PNG\r\n\x1a\n") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return "image"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "web page"
    if start.startswith(b"version https://git-lfs"):
        return "Git LFS pointer"
    if start.startswith((b"{", b"[")):
        return "JSON"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "text"
    return "unknown"


def is_hub_id(source: str) -> bool:
    """Whether a text has the form OWNER/NAME of a hub id, and is not the path of a file."""
    path = Path(source)
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None
        and path.suffix.lower()
        not in (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".yaml")
        and not path.parent.is_dir()
    )


# Of two letters or more, because one is a drive of Windows.
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)", re.IGNORECASE)
_PAGE = re.compile(
    r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:datasets|spaces|api|docs|papers)/)([\w-][\w.-]*/[\w.-]+)",
    re.IGNORECASE,
)


def is_address(source: str | Path) -> bool:
    """Whether a text, or the path that was made of it, is a web address."""
    return _ADDRESS.match(str(source)) is not None


def no_address(source: str | Path) -> str:
    """The message for a model that was named by its web address; it names the hub id if the address has one."""
    found = _ADDRESS.match(str(source))
    assert found is not None
    scheme, rest = found["scheme"], found["rest"]
    page = _PAGE.match(f"hf.co/{rest}" if scheme.lower() == "hf" else rest)
    named = f"name the hub id {page[1]}" if page else "name a hub id as OWNER/NAME"
    # A path has one of the slashes of an address.
    return f"'{scheme}://{rest}' is a web address; {named}, or download the file and name it"


_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "permission denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder; name a file",
}


def atomic_write(path: str | Path, writer: Callable[[BinaryIO], object], *, sync: bool = True) -> Path:
    """Write a temporary file, sync it and rename it to `path`: a reader sees the old file or the complete new one.

    Without `sync`, which waits for the disk, that does not hold if the machine itself goes down.

    `writer` is called with the open binary file. Parent folders are created; a device or pipe is written to. Returns
    the path. Raises UserError with the path and the remedy; the old file is then unchanged.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"cannot write '{shown(str(path))}': names hold no null character; choose another")
    temporary: str | None = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:  # renaming would remove the device
                writer(file)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            writer(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(
            f"cannot write '{path}': {_REMEDY.get(error.errno or 0, error.strerror or error)}"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"cannot write '{path}': file names are {sys.getfilesystemencoding()} here; set PYTHONUTF8=1"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | Path, what: str) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as Windows' editor also writes it.

    Raises UserError, naming the file as `what`, if it is missing, in another encoding, or no text.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from None
    try:
        text = data.decode(next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{what} {path} is not a UTF-8 text file (line {line}); save it as UTF-8 in your editor"
        ) from None
    if "\0" in text:
        raise UserError(f"{what} {path} is not a text file; name a text file in UTF-8")
    return text


def write_text(path: str | Path, text: str, *, sync: bool = True) -> Path:
    """Write a text file in UTF-8 with `atomic_write`; parts of names that are not UTF-8 are escaped."""
    return atomic_write(path, lambda file: file.write(text.encode(errors="backslashreplace")), sync=sync)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; model browsers show its first ten digits."""
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"'{path}': cannot be read ({error.strerror or error})") from error


def images_fingerprint(paths: Iterable[str | Path]) -> str:
    """Return 16 hexadecimal digits that depend on the contents of the files, not on their names or order."""
    hashes = sorted(file_hash(path) for path in paths)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def why_no_folder(path: str | Path) -> str:
    """Why no files can be written to a folder, which is there or would be made; "" if nothing is known."""
    place = Path(path)
    while not os.path.exists(place) and place != place.parent:  # False for what no path can be
        place = place.parent
    if not place.is_dir():
        return f"'{place}' is a file"
    return "" if os.access(place, os.W_OK) else "Permission denied"


def require_files(what: str, source: str, *alternatives: Sequence[str]) -> None:
    """Check that the folder `source` holds at least one file of each of `alternatives`.

    A `source` that is no folder is taken for a hub name and accepted, unless it can only be a path.

    Raises:
        UserError: it names `what` and the missing folder or file.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
            raise UserError(f"{what}: there is no such folder (looked from '{Path.cwd()}'); check the path")
        return
    for names in alternatives:
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{what}: the folder has no {' or '.join(names[:2])}; add it or name another folder"
            )


# The settings of a folder of two towers, see `ldm.models.two_towers`.
TOWERS = "towers.json"


def check_features(source: str | Path) -> None:
    """Raise UserError if `ldm.models.features` could not read a folder, without loading anything."""
    if not (Path(source) / TOWERS).is_file():
        require_files(
            f"{setting('features')} '{source}'",
            str(source),
            ("config.json", TOWERS),
            ("preprocessor_config.json",),
        )


def check_new(folder: str | Path) -> None:
    """Raise UserError if a folder that is to be written whole exists and is not empty, or cannot be made."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already; name another {setting('folder')}")
    if reason := why_no_folder(folder):
        raise UserError(f"cannot write '{folder}' ({reason}); name another {setting('folder')}")
