"""Formats of torch.save: that of the original code, and those of AUTOMATIC1111 and tools based on it."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from ldm.embeddings.concept import (
    ENCODER_KINDS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    Progress,
)
from ldm.embeddings.payload import RECORD_KEY, Payload, record_text
from ldm.images import labelled
from ldm.outlines import MAGIC, Unread, is_tensor
from ldm.pickles import ParameterDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# The token id of "*", the usual placeholder, in the vocabularies of CLIP and BERT.
STAR_IDS = {"clip": 265, "bert": 1008}
_UNKNOWN_TOKEN = -1
_PROGRESS_KEYS = ("progressive_step", "progressive_scale")


def parse_original(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embeddings of the original's file: a dict with `string_to_param` and no `name`; None for others."""
    if "string_to_param" not in payload.names or isinstance(payload.content.get("name"), str):
        return None
    held = payload.content["string_to_param"]
    vectors = _entries(held, "string_to_param")
    tokens = _entries(payload.content.get("string_to_token", {}), "string_to_token")
    record = payload.record
    progress = Progress.from_values(*(payload.content.get(key) for key in _PROGRESS_KEYS))
    concepts: list[Concept] = []
    for index, (trigger, value) in enumerate(vectors.items()):
        # The original always writes a ParameterDict, and has width 1280 for one model only: LDM with BERT.
        is_bert = isinstance(held, ParameterDict) and is_tensor(value) and value.shape[-1:] == (1280,)
        concept = record.concept(index, trigger, value, encoder="bert" if is_bert else None)
        if concept.token is None:
            concept = dataclasses.replace(concept, token=_token_id(tokens.get(trigger)))
        if progress is not None and (used := progress.in_use(len(concept.vectors))) < len(concept.vectors):
            concept = dataclasses.replace(
                concept, vectors=concept.vectors[:used], unused=concept.vectors[used:]
            )
        concepts.append(concept)
    return LearnedEmbeddings(tuple(concepts), record.metadata, "original", progress=progress)


def _entries(value: Any, name: str) -> dict[str, Any]:
    """Return the entries of a dict; raises EmbeddingError, naming it `name`, for anything else."""
    if not isinstance(value, dict):
        raise EmbeddingError(f"its {name} is not a mapping from words to tensors; the file is damaged")
    words_only = len(value) <= 4096 and all(isinstance(key, str) for key in value)
    if not words_only or not all(
        tensor is None or isinstance(tensor, int) or is_tensor(tensor) for tensor in value.values()
    ):
        raise EmbeddingError(f"its {name} does not map words to tensors; the file is damaged")
    return dict(value)


def save_original(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that the original's EmbeddingManager loads, with any number of triggers.

    A concept without token id gets that of "*" if it is its trigger, else -1, which matches no token (see
    `words_without_token`). Unused vectors are written after those in use; the progress then gives the number in use.
    Vectors of the second encoder of SDXL, which the original does not know, get a key of their own.
    """
    import torch
    from torch import nn

    tokens: dict[str, Tensor] = {}
    vectors: dict[str, nn.Parameter] = {}
    for concept in embeddings.concepts:
        key = concept.trigger
        while key in vectors:
            key += f".{concept.encoder}"
        token = token_of(concept)
        tokens[key] = torch.tensor(_UNKNOWN_TOKEN if token is None else token)
        rows = [concept.vectors] if concept.unused is None else [concept.vectors, concept.unused]
        vectors[key] = nn.Parameter(torch.cat(rows))
    content: dict[str, Any] = {
        "string_to_token": tokens,
        "string_to_param": _parameter_dict(vectors),
        RECORD_KEY: record_text(embeddings, "original"),
    }
    if embeddings.progress is not None:
        content |= dict(zip(_PROGRESS_KEYS, dataclasses.astuple(embeddings.progress), strict=True))
    save_zip(content, file)


def token_of(concept: Concept) -> int | None:
    """Return the id of a concept's trigger in the tokenizer of its encoder, if it is known."""
    if concept.token is None and concept.trigger == "*":
        return STAR_IDS["bert" if concept.encoder == "bert" else "clip"]
    return concept.token


def words_without_token(embeddings: LearnedEmbeddings) -> list[str]:
    """Return the triggers that do nothing in the original's code, which finds words by their token ids."""
    return list(dict.fromkeys(c.trigger for c in embeddings.concepts if token_of(c) is None))


def _parameter_dict(vectors: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """Return a ParameterDict that may have any words as keys.

    A ParameterDict stores its entries as attributes of a module, so its own interface refuses words with a dot
    ("cat.v2") and names of its methods ("values"). Its two internal dicts, which are what is saved, accept them.
    """
    from torch import nn

    held = nn.ParameterDict()
    held._parameters.update(vectors)
    held._keys.update(dict.fromkeys(vectors))
    return held


def _token_id(token: Any) -> int | None:
    """Return the id in an entry of `string_to_token`, an int64 tensor of one element or an int; else None."""
    if isinstance(token, Unread):
        return None
    if is_tensor(token):
        if str(token.dtype) != "torch.int64" or token.numel() != 1 or token.is_meta:
            return None
        token = int(token)
    return token if type(token) is int and 0 <= token < 2**31 else None


# How the second file ends that DreamArtist and HCP-Diffusion train for the negative prompt.
_NEGATIVE = ("-neg", "-uc")


def parse_a1111(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embedding of a dict with `string_to_param` and `name`; None for other files."""
    if "string_to_param" not in payload.names or not isinstance(payload.content.get("name"), str):
        return None
    content = payload.content
    vectors = _entries(content["string_to_param"], "string_to_param")
    if len(vectors) != 1:
        raise EmbeddingError(f"it should hold one embedding and holds {len(vectors)}; it is damaged")
    record = payload.record
    trigger = _trigger(payload, content["name"])
    part = "negative" if not record and payload.path.stem.endswith(_NEGATIVE) else ""
    concepts = [
        dataclasses.replace(concept, part=part or concept.part)
        for concept in _of_encoders(record.concept, trigger, next(iter(vectors.values())))
    ]
    kind = "hcp" if "string_to_token" not in content else "a1111"
    kind = "ai-toolkit" if "software" in content or "notes" in content else kind
    kind = "a1111-png" if payload.container == "image" else kind
    metadata = Metadata.from_values(
        {
            "steps": content.get("step"),
            "base_model": content.get("sd_checkpoint_name"),
            "base_model_hash": content.get("sd_checkpoint"),
            "tool": {"a1111": "AUTOMATIC1111", "a1111-png": "AUTOMATIC1111", "hcp": "HCP-Diffusion"}.get(
                kind, kind
            ),
        }
    )
    return LearnedEmbeddings(tuple(concepts), record.metadata if record else metadata, kind)


def _of_encoders(make: Callable[..., Concept], trigger: str, vectors: Any) -> list[Concept]:
    """Return the concept, or two where the rows hold both encoders of SDXL side by side, as HCP-Diffusion does."""
    widths = {name: ENCODER_KINDS[name].width for name in ("clip_l", "clip_g")}
    if is_tensor(vectors) and vectors.ndim == 2 and vectors.shape[1] == sum(widths.values()):
        parts = vectors.split(list(widths.values()), dim=1)
        return [Concept(trigger, rows, name) for name, rows in zip(widths, parts, strict=True)]
    return [make(0, trigger, vectors)]


def save_a1111(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write a `.pt` that AUTOMATIC1111's restricted unpickler accepts; the file's stem is the prompt word."""
    save_legacy(_content(embeddings, "a1111"), file)


def save_a1111_image(
    embeddings: LearnedEmbeddings, file: BinaryIO, preview: Image.Image | None = None
) -> None:
    """Write a PNG that carries the embedding: the preview, or without one a heat map of the first vector."""
    from ldm.embeddings import image_files

    concept = embeddings.concepts[0]
    size = concept.vectors.abs()
    shades = (size / size.max().clamp_min(1e-12))[0]
    image_files.save_image_payload(
        _content(embeddings, "a1111-png"), _titled(preview or _heat_map(shades), embeddings), shades, file
    )


def _content(embeddings: LearnedEmbeddings, format: str) -> dict[str, Any]:
    """Return what AUTOMATIC1111 stores; a word of SDXL has the keys `clip_l` and `clip_g` instead of two dicts."""
    concepts, metadata = embeddings.concepts, embeddings.metadata
    vectors: dict[str, Any] = {
        # AUTOMATIC1111 always writes "*" here, and diffusers needs that key.
        "string_to_token": {"*": STAR_IDS["clip"]},
        "string_to_param": {"*": concepts[0].vectors.clone()},
    }
    if len(concepts) > 1:
        vectors = {str(concept.encoder): concept.vectors.clone() for concept in concepts}
    return (
        vectors
        | {
            "name": concepts[0].trigger,
            "step": metadata.steps or 0,  # readers expect a number
            "sd_checkpoint": metadata.base_model_hash and metadata.base_model_hash[:10],
            "sd_checkpoint_name": metadata.base_model,
            RECORD_KEY: record_text(embeddings, format),
        }
    )


def _trigger(payload: Payload, name: str) -> str:
    """Return the prompt word: the file's stem, as in every tool that reads this format.

    There are two exceptions where it is the name inside: an image, which may have any file name, and a stem such as
    "cat-500", which is the name "cat" with the step that AUTOMATIC1111 appends.
    """
    stem = payload.stem
    appended = stem.startswith(name) and re.fullmatch(r"-\d+", stem[len(name) :])
    return name if (payload.container == "image" or appended) and name.strip() else stem


def _heat_map(shades: torch.Tensor) -> Image.Image:
    import torch

    side = int(len(shades) ** 0.5) or 1
    grey = (shades[: side * side].reshape(side, side) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(grey).resize((256, 256), Image.Resampling.NEAREST).convert("RGB")


def _titled(preview: Image.Image, embeddings: LearnedEmbeddings) -> Image.Image:
    concept, metadata = embeddings.concepts[0], embeddings.metadata
    parts = [
        concept.trigger,
        metadata.base_model,
        metadata.base_model_hash and f"[{metadata.base_model_hash[:10]}]",
        f"{len(concept.vectors)}v",
        f"{metadata.steps}s" if metadata.steps is not None else None,
    ]
    if preview.width < 256:
        preview = preview.resize(
            (256, max(1, 256 * preview.height // preview.width)), Image.Resampling.NEAREST
        )
    return labelled(preview.convert("RGB"), "  ".join(part for part in parts if part))


_PROTOCOL = 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL,
    "little_endian": sys.byteorder == "little",
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


class _Pickler(pickle.Pickler):
    """Pickles tensors without their storages, which it numbers in the order of their first use."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, tuple[str, torch.storage.TypedStorage]] = {}

    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        key, _ = self.storages.setdefault(obj._cdata, (str(len(self.storages)), obj))
        return ("storage", getattr(torch, obj._pickle_storage_type()), key, "cpu", obj._size(), None)


def save_legacy(content: Any, file: BinaryIO) -> None:
    """Write dicts, texts, numbers and CPU tensors in the layout of torch before 1.6.

    Equal contents give equal bytes.
    """
    import torch

    for head in (MAGIC, _PROTOCOL, _SYSTEM):
        pickle.dump(head, file, protocol=2)
    pickler = _Pickler(file)
    pickler.dump(content)
    pickle.dump([key for key, _ in pickler.storages.values()], file, protocol=2)
    for _, storage in pickler.storages.values():
        numbers = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        file.write(struct.pack("<q", storage._size()) + numbers.numpy().tobytes())


def save_zip(content: Any, file: BinaryIO) -> None:
    """Write what `torch.save` writes, with only the entries that torch 1.6 to 2.0 wrote.

    AUTOMATIC1111 refuses an archive with any other entry as malicious. Equal contents give equal bytes.
    """
    import torch

    whole = io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as new, zipfile.ZipFile(file, "w") as old:
        for name in new.namelist():
            if name.split("/")[1] in ("data.pkl", "data", "version"):
                old.writestr(zipfile.ZipInfo(name), new.read(name))
