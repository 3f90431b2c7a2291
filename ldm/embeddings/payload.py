"""What a file contains, whatever its name: tensors, dict and metadata, such as this project's record and ModelSpec."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from ldm.base_models import what_begins
from ldm.embeddings.concept import (
    ENCODER_KINDS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    architecture_of,
    check_shape,
    is_possible_width,
    noted_text,
)
from ldm.files import file_kind, why_unreadable
from ldm.outlines import SLACK, Unread, asks_for, is_tensor, outline_of, unzipped
from ldm.pickles import MAX_DEPTH, Storage, TensorRecord, shapes_of, tensor_records
from ldm.util import shown
from ldm.words import cleaned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RECORD_KEY = "textual_inversion"
# The format, in the record, of a file of words that are more than vectors; see ldm.embeddings.method_files.
METHOD = "method"
_MAX_RECORD = 2**18


def more_than_vectors(method: Any, instead: str) -> str:
    """Return the reason why a file of a method is refused where vectors are needed, and what to do `instead`."""
    return f"it holds words of the method '{shown(method)}', which are more than vectors; {instead}"


def record_text(embeddings: LearnedEmbeddings, format: str) -> str:
    """Return the JSON text that is written beside the vectors into a file of this format."""
    concepts = [
        {name: getattr(c, name) for name in ("trigger", "encoder", "part", "token", "initializer")}
        for c in embeddings.concepts
    ]
    concepts = [{key: value for key, value in c.items() if value not in (None, "")} for c in concepts]
    values = {"version": 1, "format": format, "concepts": concepts, **embeddings.metadata.known()}
    return json.dumps(values, sort_keys=True)


class MetadataRecord:
    """The JSON record of a file, not trusted; false if the file has none, as those of other tools."""

    def __init__(self, text: Any) -> None:
        self._values: Mapping[str, Any] = {}
        if isinstance(text, str) and len(text) <= _MAX_RECORD:
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                values = None
            self._values = values if isinstance(values, dict) else {}

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def values(self) -> Mapping[str, Any]:
        """All values, not trusted."""
        return self._values

    @property
    def format(self) -> str | None:
        """The name of the format that the file was written in, which its keys may not tell."""
        name = self._values.get("format")
        return name if isinstance(name, str) else None

    @property
    def metadata(self) -> Metadata:
        return Metadata.from_values(self._values)

    def concept(self, index: int, trigger: str, vectors: Tensor, encoder: str | None = None) -> Concept:
        """Build the concept of these vectors; values in the record's entry `index` replace the given ones."""
        concepts = self._values.get("concepts")
        entry = concepts[index] if isinstance(concepts, list) and index < len(concepts) else None
        entry = entry if isinstance(entry, dict) else {}
        width = vectors.shape[-1] if is_tensor(vectors) and vectors.ndim else 0
        kind, part, token = entry.get("encoder"), entry.get("part"), entry.get("token")
        return Concept(
            trigger=entry["trigger"] if isinstance(entry.get("trigger"), str) else trigger,
            vectors=vectors,
            encoder=kind if isinstance(kind, str) and is_possible_width(kind, width) else encoder,
            part=part if part == "negative" else "",
            token=token if type(token) is int and 0 <= token < 2**31 else None,
            initializer=noted_text(entry.get("initializer")),
        )


def modelspec_header(embeddings: LearnedEmbeddings, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the ModelSpec texts of a header for these tensors; the date is the metadata's, or now."""
    widest = max(embeddings.concepts, key=lambda concept: concept.width)
    metadata = embeddings.metadata
    side = metadata.resolution or (
        ENCODER_KINDS[widest.encoder].resolution if widest.encoder in ENCODER_KINDS else None
    )
    trigger = widest.trigger
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture_of(widest.encoder, widest.width),
        "implementation": "ldm",
        "title": f"{trigger} (textual inversion)",
        "trigger_phrase": trigger,
        "usage_hint": f"Write {trigger} in the prompt.",
        "resolution": side and f"{side}x{side}",
        "date": metadata.date or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prediction_type": "epsilon" if widest.encoder in ("clip_l", "clip_g", "bert") else None,
        "implementation_version": metadata.tool,
        "is_negative_embedding": "true" if any(c.part == "negative" for c in embeddings.concepts) else None,
        "hash_sha256": f"0x{_digest(tensors)}",
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, in the order of their names, as the file stores them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


_MAX_NUMBERS = 256 * 2**20
_CHUNK = 2**20


class TorchFile:
    """A file of `torch.save`: what it holds, with `TensorRecord` for tensors, until `load` makes tensors of them.

    Without `numbers` these are `Unread`, and torch is not needed.

    Raises EmbeddingError if it is not such a file, is damaged, or unpacks to far more than it has.
    """

    def __init__(self, path: Path, kind: str, numbers: bool = True) -> None:
        self.path, self.size, self.numbers = path, path.stat().st_size, numbers
        outline = outline_of(path, kind)
        self.pickle, self._places = outline.pickle, outline.places

    def load(self) -> Any:
        """Return the content with its tensors; raises EmbeddingError if they need more bytes than the file has."""
        if self.pickle.foreign:
            raise EmbeddingError(asks_for(self.pickle))
        records = tensor_records(self.pickle.content)
        for record in records:
            record.check()
        needed = sum(record.nbytes for record in records)
        if needed > min(2 * self.size + SLACK, _MAX_NUMBERS):
            raise EmbeddingError(
                f"its tensors need {needed:,} bytes and the file has {self.size:,}; it is no embedding, or a "
                "malicious one"
            )
        return self._loaded(self.pickle.content, {})

    def _loaded(self, value: Any, known: dict[int, Any], depth: int = 0) -> Any:
        """Return a copy of nested containers with tensors; `known` are the copies by the id of their original."""
        if not isinstance(value, (TensorRecord, dict, list, tuple)):
            return value
        if id(value) not in known:
            known[id(value)] = None  # what a container that holds itself, or is nested too deeply, becomes
            if isinstance(value, TensorRecord):
                known[id(value)] = self._tensor(value)
            elif depth <= MAX_DEPTH and isinstance(value, dict):
                items = [(key, self._loaded(item, known, depth + 1)) for key, item in value.items()]
                known[id(value)] = type(value)(items)
            elif depth <= MAX_DEPTH:
                known[id(value)] = type(value)([self._loaded(item, known, depth + 1) for item in value])
        return known[id(value)]

    def _tensor(self, record: TensorRecord) -> Tensor | Unread:
        if not self.numbers:
            return Unread(record.shape, record.storage.dtype, lambda: self._row_after_row(record))

        import torch

        dtype: torch.dtype = getattr(torch, record.storage.dtype)
        if not record.numel:
            return torch.zeros(record.shape, dtype=dtype)
        flat = torch.frombuffer(self._stored(record), dtype=dtype)
        return flat.as_strided(record.shape, record.stride).clone()

    def _row_after_row(self, record: TensorRecord) -> bytes:
        data, item = bytes(self._stored(record)), record.storage.itemsize
        steps = [
            range(0, size * step, step) if step else [0] * size
            for size, step in zip(record.shape, record.stride, strict=True)
        ]
        places = (sum(place) * item for place in itertools.product(*steps))
        return b"".join(data[place : place + item] for place in places)

    def _stored(self, record: TensorRecord) -> bytearray:
        item = record.storage.itemsize
        return self._part(record.storage, record.offset * item, record.span * item)

    def _part(self, storage: Storage, start: int, length: int) -> bytearray:
        """Read a part of a storage; the other parts are read too, for the checksum, but not kept."""
        place = self._places.get(storage.key)
        total = storage.nbytes
        if isinstance(place, int):
            with self.path.open("rb") as file:
                file.seek(place + start)
                return bytearray(file.read(length))
        kept = bytearray()
        with unzipped(self.path) as archive:
            if place is None or archive.getinfo(place).file_size < total:
                raise EmbeddingError("it declares a tensor whose numbers are missing; it is damaged")
            with archive.open(place) as file:
                at = 0
                while chunk := file.read(_CHUNK):
                    kept += chunk[max(start - at, 0) : max(start + length - at, 0)]
                    at += len(chunk)
        if len(kept) != length:
            raise EmbeddingError("it declares a tensor whose numbers are missing; it is damaged")
        return kept


# The header of a LoRA with thousands of tensors is under 1 MB.
_MAX_HEADER = 16 * 2**20


# The names that safetensors and torch give types; those of later versions are kept as they are.
_TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{
        f"{short}{bits}": f"{long}{bits}"
        for short, long in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64"},
}


@dataclass(frozen=True)
class _Place:
    """What a header says of a tensor: its shape, the name of its type in torch, and where in the file its bytes are."""

    shape: tuple[int, ...]
    kind: str
    start: int
    end: int

    @classmethod
    def of(cls, entry: Mapping[str, Any], data: int, size: int) -> _Place:
        """Read an entry of a file of `size` bytes whose numbers begin at `data`; ValueError if it cannot be."""
        if not isinstance(entry, dict) or not entry.keys() >= {"shape", "dtype", "data_offsets"}:
            raise ValueError("an entry is no description of a tensor")
        shape, kind, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]
        numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(offsets) != 2:
            raise ValueError("sizes are no whole numbers")
        if not isinstance(kind, str):
            raise ValueError("a type is no text")
        first, last = offsets
        if not first <= last <= size - data:
            raise ValueError("numbers are not in the file")
        return cls(tuple(shape), _TYPES.get(kind, shown(kind, 20)), data + first, data + last)


class TensorFile(Mapping[str, Any]):
    """The tensors of a safetensors file by name, and the texts of its header as `metadata`.

    Without `numbers` they are `Unread`, and torch is not needed.

    Opening it reads only the header. Raises EmbeddingError for a header that is damaged or far too large and, on
    access, for a tensor that is too large to be vectors or, with `numbers`, that safetensors finds damaged.
    """

    def __init__(self, path: Path, numbers: bool = True) -> None:
        self.path, self.numbers = path, numbers
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER or length > size - 8:
                raise EmbeddingError(
                    f"its header should be {length} bytes long, the file has {size}; it is cut off or damaged"
                )
            head = file.read(length)
        try:
            entries = json.loads(head)
            notes = entries.pop("__metadata__", None) or {} if isinstance(entries, dict) else None
            if not isinstance(notes, dict):
                raise ValueError("it is no mapping")
            self.metadata = {str(key): str(text) for key, text in notes.items()}
            self._places = {name: _Place.of(entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, RecursionError) as error:
            why = "it is no JSON text" if isinstance(error, (UnicodeError, RecursionError)) else str(error)
            raise EmbeddingError(
                f"its safetensors header is damaged ({shown(why, 100)}); download it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor | Unread:
        place = self._places[name]
        check_shape(place.shape, f"'{shown(name)}'")
        if not self.numbers:
            return Unread(place.shape, place.kind, lambda: self._stored(place))

        from safetensors import safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(name).clone()
        except Exception as error:
            header, _, reason = str(error).rpartition("deserializing header: ")
            what = "its safetensors header is damaged" if header else f"cannot read '{shown(name)}'"
            raise EmbeddingError(f"{what} ({shown(reason, 100)}); download it again") from error

    def _stored(self, place: _Place) -> bytes:
        with self.path.open("rb") as file:
            file.seek(place.start)
            return file.read(place.end - place.start)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: BinaryIO) -> None:
    """Write a safetensors file; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    # safetensors writes metadata in random order, so the header is replaced by one in our order, padded the same.
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    text = json.dumps({"__metadata__": dict(metadata), **header}, separators=(",", ":"))
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


@dataclass(frozen=True)
class Payload:
    """The contents of a file, not yet interpreted.

    Attributes:
        path: the file.
        container: how the contents are stored.
        load: reads the contents; see `content`.
        names: the text keys of the contents; empty if they are not a mapping.
        shapes: the shapes of all tensors, by their names; those inside of other mappings are joined with dots. Of a
            training checkpoint, those of its `state_dict`.
        header: the texts in the header of a safetensors file.
    """

    path: Path
    container: Literal["torch", "safetensors", "image"]
    load: Callable[[], Any]
    names: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def content(self) -> Any:
        """A mapping or a tensor in an embedding file; anything else in other files.

        Raises EmbeddingError if it is damaged, or needs more memory than an embedding justifies.
        """
        return self.load()

    @cached_property
    def record(self) -> MetadataRecord:
        """The record that this project wrote into the file; false if there is none."""
        if self.container == "safetensors":
            return MetadataRecord(self.header.get(RECORD_KEY))
        return MetadataRecord(self.content.get(RECORD_KEY) if RECORD_KEY in self.names else None)

    @property
    def stem(self) -> str:
        """The file's name without its suffix, which most tools use as the trigger."""
        return cleaned(self.path.stem)


def open_payload(path: Path, numbers: bool = True) -> Payload:
    """Open a file, of which only names and shapes are read, without `numbers` also later.

    Raises EmbeddingError with the reason, without the path.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        tensors = TensorFile(path, numbers)
        names = frozenset(tensors.shapes)
        return Payload(path, kind, lambda: tensors, names, tensors.shapes, tensors.metadata)
    if kind == "image":
        from ldm.embeddings import image_files

        if (size := path.stat().st_size) > image_files.MAX_IMAGE_BYTES:
            raise EmbeddingError(
                f"the image is {size / 2**20:.0f} MB, an embedding's is under {image_files.MAX_IMAGE_BYTES // 2**20}"
            )
        content = image_files.load_image_payload(path, numbers)
        return Payload(path, kind, lambda: content, _text_keys(content))
    if kind in ("zip", "pickle"):
        file = TorchFile(path, kind, numbers)
        held = file.pickle.content
        state = held.get("state_dict") if isinstance(held, dict) else None
        shapes = shapes_of(state if isinstance(state, dict) else held)
        return Payload(path, "torch", file.load, _text_keys(held), shapes)
    if why := why_unreadable(path):
        raise EmbeddingError(f"it {why}")
    if (what := what_begins(path)) is not None:
        raise EmbeddingError(f"it is {what}; name the embedding's own file")
    raise EmbeddingError("it is not an embedding file: not safetensors, torch.save, or a PNG or WebP image")


def _text_keys(content: Any) -> frozenset[str]:
    return (
        frozenset(key for key in content if isinstance(key, str))
        if isinstance(content, dict)
        else frozenset()
    )
