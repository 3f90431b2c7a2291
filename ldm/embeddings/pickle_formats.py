"""Formats of torch.save: that of the original code, and those of AUTOMATIC1111 and tools based on it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.embeddings import image_files
from ldm.embeddings.concept import Concept, EmbeddingError, LearnedEmbeddings, Metadata, Progress
from ldm.embeddings.file_metadata import RECORD_KEY, MetadataRecord, record_text
from ldm.embeddings.payload import Payload
from ldm.embeddings.torch_files import save_legacy
from ldm.images import labelled

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
    record = MetadataRecord(payload.content.get(RECORD_KEY))
    progress = Progress.from_values(*(payload.content.get(key) for key in _PROGRESS_KEYS))
    concepts = []
    for index, (trigger, value) in enumerate(vectors.items()):
        # The original always writes a ParameterDict, and has width 1280 for one model only: LDM with BERT.
        is_bert = (
            isinstance(held, nn.ParameterDict) and isinstance(value, Tensor) and value.shape[-1:] == (1280,)
        )
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
    """Return the entries of a dict or a ParameterDict; raises EmbeddingError, naming it `name`, for anything else.

    A ParameterDict saved by torch 1.11 or older has no list of its keys.
    """
    if isinstance(value, nn.ParameterDict):
        inner = value.__dict__.get("_parameters")
        keys = value.__dict__.get("_keys")
        # A ParameterDict stores a tensor that is not a Parameter as a plain attribute.
        plain = {
            key: value.__dict__[key]
            for key in (keys if isinstance(keys, Mapping) else ())
            if isinstance(value.__dict__.get(key), Tensor)
        }
        value = {**(inner if isinstance(inner, Mapping) else {}), **plain}
    if not isinstance(value, Mapping):
        raise EmbeddingError(f"its {name} is not a mapping from words to tensors; the file is damaged")
    words_only = len(value) <= 4096 and all(isinstance(key, str) for key in value)
    if not words_only or not all(
        tensor is None or isinstance(tensor, (Tensor, int)) for tensor in value.values()
    ):
        raise EmbeddingError(f"its {name} does not map words to tensors; the file is damaged")
    return dict(value)


def save_original(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that the original's EmbeddingManager loads, with any number of triggers.

    A concept without token id gets that of "*" if it is its trigger, else -1, which matches no token. Unused vectors
    are written after those in use; the progress then gives the number in use.
    """
    tokens, vectors = {}, {}
    for concept in embeddings.concepts:
        family = "bert" if concept.encoder == "bert" else "clip"
        star = STAR_IDS[family] if concept.trigger == "*" else _UNKNOWN_TOKEN
        tokens[concept.trigger] = torch.tensor(star if concept.token is None else concept.token)
        rows = [concept.vectors] if concept.unused is None else [concept.vectors, concept.unused]
        vectors[concept.trigger] = nn.Parameter(torch.cat(rows))
    content: dict[str, Any] = {
        "string_to_token": tokens,
        "string_to_param": _parameter_dict(vectors),
        RECORD_KEY: record_text(embeddings),
    }
    if embeddings.progress is not None:
        content |= dict(zip(_PROGRESS_KEYS, dataclasses.astuple(embeddings.progress), strict=True))
    torch.save(content, file)


def _parameter_dict(vectors: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """Return a ParameterDict that may have any words as keys.

    A ParameterDict stores its entries as attributes of a module, so its own interface refuses words with a dot
    ("cat.v2") and names of its methods ("values"). Its two internal dicts, which are what is saved, accept them.
    """
    held = nn.ParameterDict()
    held._parameters.update(vectors)
    held._keys.update(dict.fromkeys(vectors))
    return held


def _token_id(token: Any) -> int | None:
    """Return the id in an entry of `string_to_token`, an int64 tensor of one element or an int; else None."""
    if isinstance(token, Tensor):
        if token.dtype is not torch.int64 or token.numel() != 1 or token.is_meta:
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
    record = MetadataRecord(content.get(RECORD_KEY))
    trigger = _trigger(payload, content["name"])
    concept = record.concept(0, trigger, next(iter(vectors.values())))
    kind = "hcp" if "string_to_token" not in content else "a1111"
    kind = "ai-toolkit" if "software" in content or "notes" in content else kind
    kind = "a1111-png" if payload.container == "image" else kind
    if not record and payload.path.stem.endswith(_NEGATIVE):
        concept = Concept(concept.trigger, concept.vectors, concept.encoder, part="negative")
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
    return LearnedEmbeddings((concept,), record.metadata if record else metadata, kind)


def save_a1111(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write a `.pt` that AUTOMATIC1111's restricted unpickler accepts; the file's stem is the prompt word."""
    save_legacy(_content(embeddings), file)


def save_a1111_image(
    embeddings: LearnedEmbeddings, file: BinaryIO, preview: Image.Image | None = None
) -> None:
    """Write a PNG that carries the embedding: the preview, or without one a heat map of the first vector."""
    concept = embeddings.concepts[0]
    size = concept.vectors.abs()
    shades = (size / size.max().clamp_min(1e-12))[0]
    image_files.save_image_payload(
        _content(embeddings), _titled(preview or _heat_map(shades), embeddings), shades, file
    )


def _content(embeddings: LearnedEmbeddings) -> dict[str, Any]:
    (concept,) = embeddings.concepts
    metadata = embeddings.metadata
    return {
        # AUTOMATIC1111 always writes "*" here, and diffusers needs that key.
        "string_to_token": {"*": STAR_IDS["clip"]},
        "string_to_param": {"*": concept.vectors.clone()},
        "name": concept.trigger,
        "step": metadata.steps,
        "sd_checkpoint": metadata.base_model_hash and metadata.base_model_hash[:10],
        "sd_checkpoint_name": metadata.base_model,
        RECORD_KEY: record_text(embeddings),
    }


def _trigger(payload: Payload, name: str) -> str:
    """Return the prompt word: the file's stem, as in every tool that reads this format.

    There are two exceptions where it is the name inside: an image, which may have any file name, and a stem such as
    "cat-500", which is the name "cat" with the step that AUTOMATIC1111 appends.
    """
    stem = payload.stem
    appended = re.fullmatch(re.escape(name) + r"-\d+", stem)
    return name if (payload.container == "image" or appended) and name.strip() else stem


def _heat_map(shades: torch.Tensor) -> Image.Image:
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
