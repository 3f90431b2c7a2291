"""Files of words that are more than vectors: a method's name, its options and its tensors in one `.safetensors`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from ldm.embeddings.concept import (
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    is_possible_width,
    model_names,
    noted_text,
    quoted,
)
from ldm.embeddings.payload import METHOD, RECORD_KEY, Payload, open_payload, save_tensors
from ldm.embeddings.reader import read
from ldm.embeddings.tensor_formats import is_xti, layers_of_xti
from ldm.files import atomic_write
from ldm.outlines import Unread
from ldm.util import UserError, shown
from ldm.values import is_finite
from ldm.words import check_text, check_word, folded

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
# The largest are networks of some hundred thousand numbers for each word.
_MAX_BYTES = 2**28
_MOST_VECTORS = 1024
_Values = Mapping[str, float | int]


@dataclass(frozen=True, eq=False)
class MethodFile:
    """What a file of a method holds.

    Attributes:
        method: its name, such as "prospect".
        words: each word with the number of token positions that it takes.
        tensors: by name; those of several words begin with the word's number and a dot.
        options: numbers that the method is built with.
        dials: numbers that can be changed when generating.
        initializers: the text at which each word began, as far as it is known.
        encoder, width: the text encoder that it is for; see `ldm.embeddings.concept.ENCODER_KINDS`.
        source: the name of the file.
        metadata: how the words were trained.
    """

    method: str
    words: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    options: _Values = field(default_factory=dict)
    dials: _Values = field(default_factory=dict)
    encoder: str | None = None
    width: int = 0
    source: str = ""
    initializers: Mapping[str, str] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def triggers(self) -> list[str]:
        """The words, as `LearnedEmbeddings` has them."""
        return list(self.words)

    def described(self) -> str:
        """One line for people: the method, the words, what the file is for, and its dials."""
        words = ", ".join(
            f"'{shown(word)}' ({count}{self._from(word)})" for word, count in self.words.items()
        )
        dials = ", ".join(f"{shown(name)}={value:g}" for name, value in self.dials.items()) or "none"
        return (
            f"words of the method '{shown(self.method)}': {words}, for {model_names(self.encoder, self.width)}; dials: "
            f"{dials}"
        )

    def _from(self, word: str) -> str:
        return f", from '{shown(self.initializers[word])}'" if word in self.initializers else ""

    def renamed(self, names: Mapping[str, str]) -> MethodFile:
        """Return the same words with new names, `names` by old name; unknown ones raise EmbeddingError."""
        for old in names:
            if old not in self.words:
                raise EmbeddingError(f"there is no word '{shown(old)}'; there is {quoted(self.triggers)}")
        kept = [(check_word(names.get(word, word), "trigger"), count) for word, count in self.words.items()]
        if len(dict(kept)) < len(kept):
            raise EmbeddingError("two words would have the same name; choose another")
        began = {
            new: self.initializers[old]
            for old, (new, _) in zip(self.words, kept, strict=True)
            if old in self.initializers
        }
        return replace(self, words=dict(kept), initializers=began)

    def only(self, word: str) -> MethodFile:
        """One of the words alone."""
        if len(self.words) == 1:
            return self
        start = f"{self.triggers.index(word)}."
        tensors = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        began = {word: self.initializers[word]} if word in self.initializers else {}
        return replace(self, words={word: self.words[word]}, tensors=tensors, initializers=began)

    def check_encoder(self, encoder: str, width: int) -> None:
        """Raise EmbeddingError if it is for another text encoder than this one."""
        if self.width != width or self.encoder not in (None, encoder):
            raise EmbeddingError(
                f"'{self.source}' is for {model_names(self.encoder, self.width)}; this model's text encoder is "
                f"{encoder} of width {width}, so use the model that it was learned on"
            )


# The methods that are known, with the names of their classes in `ldm.modules.methods`.
CLASSES = {"prospect": "ProSpect", "xti": "XTI", "neti": "NeTI", "output": "OutputResidual", "grid": "Grid"}


def check_method(file: MethodFile) -> None:
    """Raise UserError for a file of an unknown method."""
    if file.method not in CLASSES:
        raise UserError(
            f"'{file.source}' is of the method '{shown(file.method)}'; known are {', '.join(CLASSES)}"
        )


def check_distinct(words: Sequence[str], fold: Callable[[str], str] = folded) -> None:
    """Raise UserError for a word that several files hold; `fold` gives the form in which words are compared."""
    forms = [fold(word) for word in words]
    for word in words:
        if forms.count(fold(word)) > 1:
            raise UserError(
                f"two of the files hold '{word}'; load one of them, or learn the other as another word"
            )


def check_dial(name: str, value: float, options: _Values) -> None:
    """Raise UserError for a value that a dial of these methods cannot have; `options` as in `MethodFile`."""
    hidden = options.get("hidden", math.inf)  # a damaged file has none
    wanted = {"strength": "0 to 2", "bypass": "0 to 1", "truncation": f"a whole number from 0 to {hidden:g}"}
    most = {"strength": 2, "bypass": 1, "truncation": hidden}
    if name in most and (not 0 <= value <= most[name] or (name == "truncation" and value != int(value))):
        raise UserError(f"the dial {name} is {value:g}; use {wanted[name]}")


def write_method_file(content: MethodFile, path: str | Path) -> Path:
    """Write a file atomically, whatever its suffix, and return its path."""
    record = {
        "version": VERSION,
        "format": METHOD,
        "method": content.method,
        "words": dict(content.words),
        "options": dict(content.options),
        "dials": dict(content.dials),
        "initializers": dict(content.initializers),
        "encoder": content.encoder,
        "width": content.width,
        "metadata": content.metadata.known(),
    }
    header = {
        "format": "pt",
        "modelspec.trigger_phrase": next(iter(content.words), ""),
        RECORD_KEY: json.dumps(record, sort_keys=True),
    }
    tensors = {name: value.detach().cpu() for name, value in content.tensors.items()}

    def save(file: BinaryIO) -> None:
        save_tensors(tensors, header, file)

    return atomic_write(Path(path), save)


def read_method_file(path: str | Path, numbers: bool = True) -> MethodFile | None:
    """Read a file of a method, or the XTI file of another tool; None for any other file.

    `numbers` as for `read`. Raises EmbeddingError, one line with the path and the reason, for one that is damaged or of
    a later version.
    """
    path = Path(path)
    try:
        payload = open_payload(path, numbers)
    except (UserError, OSError):
        return None  # whoever wants to read it as vectors says why it cannot be read
    try:
        if payload.record.format == METHOD:
            return _parse(payload, numbers)
        if is_xti(payload.names):
            return _of_another_tool(payload)
    except UserError as error:
        raise error if str(path) in str(error) else EmbeddingError(f"'{path}': {error}") from error
    return None


def read_words(path: str | Path, numbers: bool = True) -> LearnedEmbeddings | MethodFile:
    """What is in a file of vectors of any tool, or of a method; EmbeddingError if it is neither.

    `numbers` as for `read`.
    """
    return read_method_file(path, numbers) or read(path, numbers=numbers)


def triggers_of(path: str | Path) -> list[str]:
    """The words in a file of vectors or of a method; EmbeddingError if it is neither."""
    return read_words(path, numbers=False).triggers


def words_to_begin(
    path: str | Path, method: str, kind: str, placeholders: Sequence[str] | None = None, numbers: bool = True
) -> MethodFile:
    """Read a file from which words of a method, whose class is `kind`, begin, under the names of placeholders.

    `numbers` as for `read`. Raises UserError for a file of another method, or one whose words are not all of the
    placeholders, unless both have one.
    """
    content = read_method_file(path, numbers)
    if content is None:
        read(path, numbers=numbers)  # says what is wrong with a file that is none
    if content is None or content.method != method:
        held = "holds plain vectors" if content is None else f"is of the method '{content.method}'"
        raise UserError(
            f"'{path}' {held}, and {kind} needs a file of '{method}'; name one, or use the personalization that wrote "
            "this one"
        )
    return content if placeholders is None else _under(content, placeholders)


def _under(content: MethodFile, strings: Sequence[str]) -> MethodFile:
    """A file under the placeholders of a YAML: all of them by name, or its only word as the only one.

    Raises:
        UserError: the names do not fit.
    """
    if set(content.words) == set(strings):
        return content
    if len(content.words) == len(strings) == 1:
        return content.renamed(dict(zip(content.words, strings, strict=True)))
    held = "', '".join(check_text(word, "word")[:30] for word in list(content.words)[:4])
    raise UserError(
        f"'{content.source}' holds '{held}', and placeholder_strings are '{', '.join(strings)[:100]}'; name the same "
        "words"
    )


def _of_another_tool(payload: Payload) -> MethodFile:
    """The file that the tools of XTI write, a vector for each layer: the method is in the names alone."""
    layers = layers_of_xti(payload)
    first = next(iter(layers.values()))
    return MethodFile(
        "xti",
        {first.trigger: len(first.vectors)},
        {name: concept.vectors for name, concept in layers.items()},
        encoder=first.encoder,
        width=first.width,
        source=payload.path.name,
    )


def _parse(payload: Payload, numbers: bool) -> MethodFile:
    values: Mapping[str, Any] = payload.record.values
    if values.get("version") != VERSION:
        raise EmbeddingError(
            f"it has version {shown(values.get('version'))} of the files of methods, and {VERSION} is known; update "
            "this program, or train again"
        )
    if payload.path.stat().st_size > _MAX_BYTES:
        raise EmbeddingError("it is too large for learned words")
    words, method = values.get("words"), values.get("method")
    if not isinstance(words, dict) or not words or not isinstance(method, str):
        raise EmbeddingError("its record names no method or no words; it is damaged")
    for count in words.values():
        if type(count) is not int or not 1 <= count <= _MOST_VECTORS:
            raise EmbeddingError(f"a word has {shown(count)} vectors; it is damaged")
    encoder, width, began = (values.get(name) for name in ("encoder", "width", "initializers"))
    began = began if isinstance(began, dict) else {}
    width = width if type(width) is int else 0
    tensors: dict[str, Any] = (
        _tensors(payload) if numbers else {name: Unread(shape) for name, shape in payload.shapes.items()}
    )
    return MethodFile(
        method,
        {check_word(word): count for word, count in words.items()},
        tensors,
        _numbers(values.get("options")),
        _numbers(values.get("dials")),
        encoder if isinstance(encoder, str) and is_possible_width(encoder, width) else None,
        width,
        payload.path.name,
        {check_word(word): text for word in words if (text := noted_text(began.get(word)))},
        Metadata.from_values(known if isinstance(known := values.get("metadata"), dict) else {}),
    )


def _tensors(payload: Payload) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(payload.path)
    except SafetensorError as error:
        raise EmbeddingError(f"it is damaged ({shown(str(error), 80)})") from error
    if not all(value.isfinite().all() for value in tensors.values()):
        raise EmbeddingError("it holds NaN or infinity; train again with a lower learning rate")
    return tensors


def _numbers(values: Any) -> dict[str, float | int]:
    items = values.items() if isinstance(values, dict) else ()
    numbers = {str(name): value for name, value in items if type(value) in (int, float)}
    for name, value in numbers.items():
        if not is_finite(value):
            raise EmbeddingError(f"its '{shown(name)}' is {shown(value)}, no finite number; it is damaged")
    return numbers
