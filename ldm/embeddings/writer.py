"""Writing embedding files in the formats of all tools, and their file names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from ldm.embeddings import pickle_formats, tensor_formats
from ldm.embeddings.concept import (
    EmbeddingError,
    LearnedEmbeddings,
    is_ambiguous_width,
    model_names,
    quoted,
)
from ldm.files import atomic_write
from ldm.front_ends import setting
from ldm.util import shown
from ldm.words import file_stem


@dataclass(frozen=True)
class Format:
    """How a format is written.

    Attributes:
        save: writes one file.
        suffix: of the file.
        several_triggers: whether one file can hold several words.
        encoders: what holds a word of SDXL: "together" one file, "apart" one file for each encoder.
        states_encoder: whether readers derive the text encoder from the file alone, so that it must be known.
    """

    save: Callable[..., None]
    suffix: str
    several_triggers: bool = False
    encoders: Literal["together", "apart"] = "together"
    states_encoder: bool = False


FORMATS = {
    "original": Format(pickle_formats.save_original, ".pt", several_triggers=True, states_encoder=True),
    "safetensors": Format(tensor_formats.save_emb_params, ".safetensors", states_encoder=True),
    "diffusers": Format(tensor_formats.save_diffusers, ".safetensors", encoders="apart"),
    "a1111": Format(pickle_formats.save_a1111, ".pt"),
    "a1111-png": Format(pickle_formats.save_a1111_image, ".png"),
    "onetrainer": Format(tensor_formats.save_onetrainer, ".safetensors"),
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
    check_supported(embeddings, format)
    save = chosen.save
    if preview is not None and format == "a1111-png":
        save = functools.partial(save, preview=preview)
    files = files_of(embeddings, path, format)
    parts = [embeddings]
    if len(files) > 1:  # SDXL's first encoder first, whatever the order of the concepts
        ordered = sorted(embeddings.concepts, key=lambda concept: concept.encoder != "clip_l")
        parts = [dataclasses.replace(embeddings, concepts=(concept,)) for concept in ordered]
    for part, file in zip(parts, files, strict=True):
        atomic_write(file, functools.partial(_save_to, save, part))
    return files[0]


def _save_to(save: Callable[..., None], embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    save(embeddings, file)


def files_of(embeddings: LearnedEmbeddings, path: str | Path, format: str = DEFAULT_FORMAT) -> list[Path]:
    """Return the files that `write` makes: one, or for a word of SDXL in a format of one encoder per file, two.

    The second is named as diffusers names it: cat.safetensors, cat_2.safetensors.
    """
    path = Path(path)
    if format_named(format).encoders == "together" or len(embeddings.concepts) <= len(embeddings.triggers):
        return [path]
    return [path, path.with_stem(path.stem + tensor_formats.SECOND_FILE)]


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
        check_supported(part, format)
    paths = paths_for(list(parts), folder, format)
    for part, path in zip(parts.values(), paths, strict=True):
        write(part, path, format, preview)
    return [
        file
        for part, path in zip(parts.values(), paths, strict=True)
        for file in files_of(part, path, format)
    ]


def paths_for(triggers: list[str], folder: str | Path, format: str = DEFAULT_FORMAT) -> list[Path]:
    """Return the path that `write_all` uses for each trigger; a number is appended where names would be equal."""
    chosen = format_named(format)
    home = Path(folder) if format == DEFAULT_FORMAT else Path(folder) / format
    # A word of SDXL may need a second file.
    ends = ("", tensor_formats.SECOND_FILE) if chosen.encoders == "apart" else ("",)
    taken: set[str] = set()
    paths = []
    for trigger in triggers:
        stem, number = file_stem(trigger), 1
        while True:
            name = stem if number == 1 else f"{stem}-{number}"
            names = {f"{name}{end}".casefold() for end in ends}
            if not names & taken:
                break
            number += 1
        taken |= names
        paths.append(home / f"{name}{chosen.suffix}")
    return paths


def format_named(name: str) -> Format:
    """Return the format of this name; the EmbeddingError for an unknown one lists the known ones."""
    if name not in FORMATS:
        raise EmbeddingError(f"unknown embedding format '{shown(name)}'; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def check_supported(embeddings: LearnedEmbeddings, name: str) -> None:
    """Raise EmbeddingError for embeddings that the format of this name cannot hold."""
    chosen = format_named(name)
    unsupported = sorted({concept.part for concept in embeddings.concepts} - {"", "negative"})
    if unsupported:
        raise EmbeddingError(
            f"no format can hold the parts {quoted(unsupported)} of '{shown(embeddings.triggers[0])}'"
        )
    if len(embeddings.triggers) > 1 and not chosen.several_triggers:
        raise EmbeddingError(
            f"the format '{name}' holds one trigger, not {quoted(embeddings.triggers)}; split them, or use 'original'"
        )
    for trigger in embeddings.triggers:
        encoders = [str(c.encoder) for c in embeddings.concepts if c.trigger == trigger]
        if len(encoders) > 1 and (set(encoders) != {"clip_l", "clip_g"} or len(encoders) > 2):
            raise EmbeddingError(
                f"'{shown(trigger)}' has vectors of {quoted(encoders)}; a file holds those of one text encoder, or "
                "of SDXL's two, clip_l and clip_g"
            )
    for concept in embeddings.concepts:
        if chosen.states_encoder and is_ambiguous_width(concept.encoder, concept.width):
            raise EmbeddingError(
                f"'{shown(concept.trigger)}': width {concept.width} is for {model_names(None, concept.width)}, "
                f"and the file does not say which; give the encoder ({setting('encoder')})"
            )
