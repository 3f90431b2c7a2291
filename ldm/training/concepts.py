"""Learned words in Python: `ldm.load` from files, run folders and the Hugging Face hub, and what is done with them."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm import files
from ldm.embeddings import DEFAULT_FORMAT, LearnedEmbeddings, merge, read, write
from ldm.embeddings import Concept as ConceptVectors
from ldm.embeddings.method_files import MethodFile, read_words, write_method_file
from ldm.embeddings.tensor_formats import SECOND_FILE
from ldm.embeddings.writer import format_named
from ldm.files import in_checkout
from ldm.generate.request import of_own_class
from ldm.images import open_image
from ldm.training.record import RunRecord, is_run
from ldm.util import UserError, check_value, cut, shown
from ldm.values import plain
from ldm.weights import hub_reason
from ldm.words import check_word, file_stem
from ldm.yaml_files import read_yaml

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Concept:
    """A learned word: its vectors, the file they are in, and the run that they come from.

    `ldm.generate(..., words=concept)` uses it. A word that was learned by a method may be more than vectors (see
    `ldm.modules.methods`); `embeddings` is then what its file holds.
    """

    embeddings: LearnedEmbeddings | MethodFile
    path: Path | None = None
    run: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.embeddings, (LearnedEmbeddings, MethodFile)):
            raise UserError(
                f"{type(self.embeddings).__name__} holds no learned word; concepts come from ldm.invert and ldm.load"
            )

    @property
    def word(self) -> str:
        """The placeholder to write in prompts; the first, if there are several."""
        return self.words[0]

    @property
    def words(self) -> list[str]:
        """All placeholders that it holds."""
        return self.embeddings.triggers

    @property
    def vectors(self) -> Tensor:
        """The vectors [N, d] of the (first) word, float32 on the CPU.

        Raises:
            UserError: it is of a method whose words are more than vectors.
        """
        return self._plain("have vectors alone").concepts[0].vectors

    def _plain(self, wish: str) -> LearnedEmbeddings:
        if isinstance(self.embeddings, MethodFile):
            raise UserError(
                f"'{shown(self.word)}' is of the method '{shown(self.embeddings.method)}', whose words are more than "
                f"vectors: it cannot {wish}; generate with it here, and save it in the default format"
            )
        return self.embeddings

    @property
    def record(self) -> RunRecord | None:
        """The curves, previews and verdict of its run."""
        return None if self.run is None else RunRecord.read(self.run, own=True)

    def renamed(self, word: str) -> Concept:
        """The same vectors for another word; a negative word that belongs to it is renamed with it."""
        return replace(self, embeddings=self.embeddings.renamed({self.word: check_word(word)}), path=None)

    def save(
        self,
        path: str | Path | None = None,
        format: str | None = None,
        preview: Image.Image | None = None,
    ) -> Path:
        """Write a file in the format of a tool (a key of `ldm.FORMATS`) and return its path.

        Args:
            path: a file; a folder gets a file that is named after the word, as does the current one by default.
            format: by default that of the path's suffix: .pt is "original", .png "a1111-png", .safetensors
                "safetensors". Without a suffix it is "safetensors", or "original" for several words.
            preview: what an "a1111-png" shows.

        Raises:
            UserError: the format is unknown or cannot hold the vectors, or the file cannot be written.
        """
        check_value("path", path, "", str | None)
        check_value("format", format, "", str | None)
        place = Path() if path is None else Path(path)
        is_folder = place.is_dir() or (isinstance(path, str) and path.endswith(("/", os.sep)))
        if format is None:
            several = len(self.words) > 1 and isinstance(self.embeddings, LearnedEmbeddings)
            otherwise = "original" if several else DEFAULT_FORMAT
            format = otherwise if is_folder else _FORMAT_OF.get(place.suffix.lower(), otherwise)
        suffix = format_named(format).suffix
        if is_folder:
            place /= f"{file_stem(self.word)}{suffix}"
        if isinstance(self.embeddings, MethodFile) and format == DEFAULT_FORMAT:
            return write_method_file(self.embeddings, place)
        image = None if preview is None else open_image(preview)
        return write(self._plain(f"be written as {format}"), place, format, image)

    def __repr__(self) -> str:
        if isinstance(self.embeddings, MethodFile):
            return f"<Concept {self.word!r} of the method {self.embeddings.method}>"
        count, width = self.vectors.shape
        return f"<Concept {self.word!r}: {count} vector{'s' * (count > 1)} of width {width}>"


# The format of a file whose format is not named, by its suffix.
_FORMAT_OF = {".safetensors": DEFAULT_FORMAT, ".pt": "original", ".bin": "original", ".png": "a1111-png"}


def load(source: str | Path) -> Concept:
    """Load what was learned from one file of any tool, a run folder, or a repository on the Hugging Face hub.

    Args:
        source: a file; a folder; "owner/name" on the hub, or "owner/name/file" where that holds several.

    Raises:
        UserError: there is no such file or repository, or it holds no embedding, or several.
    """
    found = _concepts_of(source)
    if len(found) > 1:
        names = ", ".join(f"'{one.path.name}'" for one in found if one.path)
        raise UserError(
            f"'{source}' holds {len(found)} embedding files ({cut(names, 120)}); name one, or use ldm.load_all"
        )
    return found[0]


def load_all(sources: str | Path | Iterable[str | Path]) -> list[Concept]:
    """Load all words of one or several sources (see `load`), one `Concept` for each word.

    Raises:
        UserError: there is no such source, or one holds no embedding.
    """
    is_list = isinstance(sources, Iterable) and not isinstance(sources, (str, Path, bytes))
    several: list[Any] = list(sources) if is_list else [sources]  # type: ignore[arg-type]
    found = [concept for source in several for concept in _concepts_of(source)]
    return [part for concept in found for part in _apart(concept)]


def _apart(concept: Concept) -> list[Concept]:
    """One concept for each word; the words of a method stay together."""
    held = concept.embeddings
    if isinstance(held, MethodFile):
        return [concept]
    return [replace(concept, embeddings=held.only(word)) for word in held.triggers]


def _concepts_of(source: str | Path) -> list[Concept]:
    if not isinstance(source, (str, Path)) or not str(source):
        raise UserError(
            f"the source of a word is {shown(repr(source))}; name an embedding file, a run folder, or OWNER/NAME"
        )
    path = Path(in_checkout(str(source)))
    # Unlike those of Path, these functions of os.path take any text.
    if not os.path.exists(path) and (match := _HUB.fullmatch(str(source))):
        path = _from_hub(match["repository"], match["file"])
    if not os.path.isdir(path):
        return [Concept(read_words(path), path)]
    if is_run(path):
        return [concept_of_run(path)]
    files_there = _embedding_files(path)
    if not files_there:
        runs = sum(is_run(folder) for folder in path.iterdir() if folder.is_dir())
        raise UserError(
            f"'{source}' holds no learned word; name "
            + (f"one of its {runs} run folders" if runs else "an embedding file, or a folder with some")
        )
    return [_of_file(file, files_there) for file in files_there if not _is_second(file, files_there)]


# A repository in the hub, and perhaps a file in it.
_HUB = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[\w.-]+))?")
# The endings of embedding files in folders and repositories; of files with the same stem the first is used.
_ENDINGS = (".safetensors", ".bin", ".pt")
# What diffusers writes during a run beside the last file, and how large a file with learned words may be.
_UNFINISHED = re.compile(r"learned_embeds-steps-\d+")
_LARGEST = 32 * 2**20
# A repository of diffusers' concept library says its word in this file.
_IDENTIFIER = "token_identifier.txt"


def _embedding_files(folder: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for ending in _ENDINGS:
        for path in sorted(folder.glob(f"*{ending}")):
            if not _UNFINISHED.fullmatch(path.stem):
                found.setdefault(path.stem, path)
    return list(found.values())


def _is_second(path: Path, others: Sequence[Path]) -> bool:
    """Whether it holds the vectors of SDXL's second encoder for a file beside it."""
    return any(path.stem == f"{other.stem}{SECOND_FILE}" for other in others)


def _of_file(path: Path, others: Sequence[Path]) -> Concept:
    second = [other for other in others if other.stem == f"{path.stem}{SECOND_FILE}"]
    learned = merge([read(file) for file in (path, *second)]) if second else read_words(path)
    identifier = path.with_name(_IDENTIFIER)
    # Some formats hold no word, and the file's name takes its place.
    if learned.triggers == [path.stem] and identifier.is_file():
        return Concept(
            learned.renamed({path.stem: files.read_text(identifier, "token identifier").strip()}), None
        )
    return Concept(learned, None if second else path)


def _from_hub(repository: str, file: str | None) -> Path:
    """The folder of the embedding files of a repository, or one of them; fetched once.

    Without a connection the folder is what was fetched before, which may be some of the files.
    """
    import huggingface_hub as hub

    before = None
    try:
        folder = Path(hub.snapshot_download(repository, local_files_only=True))
        if file and (folder / file).is_file():
            return folder / file
        if not file and _embedding_files(folder):
            before = folder
    except (OSError, ValueError):  # what the hub raises if nothing is there
        pass
    try:
        there = hub.HfApi().model_info(repository, files_metadata=True).siblings or []
        wanted = [
            entry.rfilename
            for entry in there
            if entry.rfilename in (file, _IDENTIFIER)
            or (
                file is None
                and "/" not in entry.rfilename
                and entry.rfilename.endswith(_ENDINGS)
                and (entry.size or 0) <= _LARGEST
            )
        ]
        folder = Path(hub.snapshot_download(repository, allow_patterns=wanted or [_IDENTIFIER]))
    except Exception as error:  # of many kinds: no connection, no such repository, no access, a full disk
        if before is not None:
            logger.info("'%s' is taken as it was fetched before: %s", repository, hub_reason(error))
            return before
        raise UserError(
            f"'{repository}' is neither a file or folder here nor readable from the Hugging Face hub "
            f"({hub_reason(error)}); check the name, or download the file and name that"
        ) from error
    place = folder / file if file else folder
    if not place.exists() or (place.is_dir() and not _embedding_files(place)):
        raise UserError(
            f"the repository '{repository}' holds no {f'file {file!r}' if file else 'embedding file'} at its top; "
            "name one that was learned by textual inversion"
        )
    return place


def interpolate(first: Concept, second: Concept, share: float, word: str | None = None) -> Concept:
    """A concept between two: `share` 0 gives the first, 1 the second; its vectors lie on the line between theirs.

    Raises:
        UserError: they have different numbers of vectors or are for different text encoders.
    """
    share = plain(share)
    if not isinstance(share, (int, float)) or not math.isfinite(share):
        raise UserError(f"share is {shown(share)}; give a number, from 0 for the first to 1 for the second")
    for one in (first, second):
        if not isinstance(one, Concept):
            raise UserError(f"{type(one).__name__} is no concept; give two of ldm.load or ldm.invert")
    a, b = (one._plain("be interpolated").concepts for one in (first, second))
    if [c.vectors.shape for c in a] != [c.vectors.shape for c in b] or [c.encoder for c in a] != [
        c.encoder for c in b
    ]:
        raise UserError(
            f"{first!r} and {second!r} cannot be interpolated: their vectors differ in number or kind"
        )
    name = None if word is None else check_word(word)
    mixed = tuple(
        ConceptVectors(name or one.trigger, one.vectors.lerp(other.vectors, share), one.encoder, one.part)
        for one, other in zip(a, b, strict=True)
    )
    return Concept(LearnedEmbeddings(mixed))


def concept_of_run(folder: Path) -> Concept:
    """What a run has learned: the vectors of its best step, if it measured one, else of the last.

    Raises:
        UserError: it has learned nothing yet, or by a class whose files it alone reads.
    """
    found = files_of_run(folder)
    if not found:
        raise UserError(
            f"'{folder}' holds no learned word yet; name a run folder with checkpoints/embeddings.pt"
        )
    saved = sorted((folder / "configs").glob("*project.yaml"))
    if saved and (target := of_own_class(read_yaml(saved[-1]))):
        raise UserError(
            f"what '{shown(target)}' learned is in '{found[0]}', which that class alone reads: generate with "
            f"ldm.generate(prompt, words='{found[0]}', config='{saved[-1]}')"
        )
    return Concept(read_words(found[0]), found[0], folder)


def files_of_run(folder: Path) -> list[Path]:
    """The files with the vectors of the best step, if the run measured one, and of the last."""
    found = RunRecord.read(folder, own=True).concepts()
    return [found[name] for name in ("best", "last") if name in found]
