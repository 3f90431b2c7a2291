"""What all text encoders share: reading from folders and the hub, token ids, and the call with an embedding manager."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ldm.util import UserError

WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def require_files(what: str, source: str, *alternatives: Sequence[str]) -> None:
    """Check that the folder `source` holds one file of each of `alternatives`.

    A `source` that is no folder is a hub name and passes, unless it can only be meant as a path. Raises
    UserError that names `what` and what is missing.
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


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Turn whatever the Hugging Face readers raise within into one UserError with a remedy.

    They show a bar only where they download something.
    """
    try:
        with _without_bars() if Path(source).is_dir() else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:  # the readers raise many kinds, from OSError to SafetensorError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(source).is_dir():
            raise UserError(f"{what}: a file in the folder cannot be read ({reason}); replace it") from error
        raise UserError(
            f"{what} is neither a folder here nor readable from the Hugging Face hub ({reason}); "
            f"go online for the first use, or name a local folder"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read_tokenizer(kind: Any, what: str, source: str) -> Any:
    """Read a tokenizer of the class `kind`; one without words is a UserError too.

    transformers 5 makes up a tokenizer of special tokens alone where it finds no vocabulary.
    """
    with reading(what, source):
        tokenizer = kind.from_pretrained(source)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise OSError("no vocabulary was found")
    return tokenizer
