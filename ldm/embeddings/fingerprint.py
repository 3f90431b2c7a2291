"""Short proofs of identity that a file can carry: of a base model, and of a set of training images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ldm.embeddings.concept import EmbeddingError


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal; its first ten digits are the hash that model browsers show."""
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise EmbeddingError(f"'{path}': cannot be read ({error.strerror or error})") from error


def images_fingerprint(paths: Iterable[str | Path]) -> str:
    """16 hexadecimal digits that depend on the contents of the files, and not on their names or order."""
    hashes = sorted(file_hash(path) for path in paths)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
