"""Writing embedding files in the formats of all tools, and their file names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.embeddings import pickle_formats, tensor_formats
from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings, quoted
from ldm.files import atomic_write
from ldm.words import file_stem


@dataclass(frozen=True)
class Format:
    """How a format is written: the function, the file suffix, and what one file can hold."""

    save: Callable[..., None]
    suffix: str
    several_triggers: bool = False
    several_encoders: bool = False


FORMATS = {
    "original": Format(pickle_formats.save_original, ".pt", several_triggers=True),
    "safetensors": Format(tensor_formats.save_emb_params, ".safetensors", several_encoders=True),
    "diffusers": Format(tensor_formats.save_diffusers, ".safetensors"),
    "a1111": Format(pickle_formats.save_a1111, ".pt"),
    "a1111-png": Format(pickle_formats.save_a1111_image, ".png"),
    "onetrainer": Format(tensor_formats.save_onetrainer, ".safetensors", several_encoders=True),
}
DEFAULT_FORMAT = "safetensors"


def write(
    embeddings: LearnedEmbeddings,
    path: str | Path,
    format: str = DEFAULT_FORMAT,
    preview: Image.Image | None = None,
) -> Path:
    """Write one file atomically and return its path.

    `format` is a key of `FORMATS`; the suffix of `path` does not matter. `preview` is the image of an "a1111-png".
    Raises EmbeddingError for an unknown format and for embeddings that the format cannot hold.
    """
    chosen = format_named(format)
    _check_supported(embeddings, format, chosen)
    save = chosen.save
    if preview is not None and format == "a1111-png":
        save = functools.partial(save, preview=preview)
    return atomic_write(path, lambda file: save(embeddings, file))


def write_all(
    embeddings: LearnedEmbeddings,
    folder: str | Path,
    format: str = DEFAULT_FORMAT,
    preview: Image.Image | None = None,
) -> list[Path]:
    """Write all triggers into a folder and return the paths: one file if the format holds several, else one each.

    The files are `embeddings.pt`, `<trigger>.safetensors`, and for other formats `<format>/<trigger><suffix>`.
    """
    chosen = format_named(format)
    if chosen.several_triggers:
        return [write(embeddings, Path(folder) / f"embeddings{chosen.suffix}", format)]
    parts = {trigger: embeddings.only(trigger) for trigger in embeddings.triggers}
    for part in parts.values():
        _check_supported(part, format, chosen)
    paths = paths_for(list(parts), folder, format)
    return [write(part, path, format, preview) for part, path in zip(parts.values(), paths, strict=True)]


def paths_for(triggers: list[str], folder: str | Path, format: str = DEFAULT_FORMAT) -> list[Path]:
    """Return the path that `write_all` uses for each trigger; a number is appended where names would be equal."""
    chosen = format_named(format)
    home = Path(folder) if format == DEFAULT_FORMAT else Path(folder) / format
    taken: set[str] = set()
    paths = []
    for trigger in triggers:
        stem, number = file_stem(trigger), 1
        while (name := stem if number == 1 else f"{stem}-{number}").casefold() in taken:
            number += 1
        taken.add(name.casefold())
        paths.append(home / f"{name}{chosen.suffix}")
    return paths


def format_named(name: str) -> Format:
    """Return the format of this name; the EmbeddingError for an unknown one lists the known ones."""
    if name not in FORMATS:
        raise EmbeddingError(f"unknown embedding format '{name}'; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _check_supported(embeddings: LearnedEmbeddings, name: str, chosen: Format) -> None:
    """Raise EmbeddingError for embeddings that the format cannot hold."""
    unsupported = sorted({concept.part for concept in embeddings.concepts} - {"", "negative"})
    if unsupported:
        raise EmbeddingError(
            f"no format can hold the parts {quoted(unsupported)} of '{embeddings.triggers[0]}'"
        )
    if len(embeddings.triggers) > 1 and not chosen.several_triggers:
        raise EmbeddingError(
            f"the format '{name}' holds one trigger, not {quoted(embeddings.triggers)}; split them, or use 'original'"
        )
    if len(embeddings.concepts) > len(embeddings.triggers) and not chosen.several_encoders:
        encoders = quoted([str(concept.encoder) for concept in embeddings.concepts])
        raise EmbeddingError(
            f"the format '{name}' holds vectors of one text encoder, not {encoders}; use 'safetensors'"
        )
