"""Formats written with torch.save: the original's, AUTOMATIC1111's and its relatives'."""

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
from ldm.embeddings.payload import Payload
from ldm.embeddings.records import RECORD_KEY, MetadataRecord, record_of
from ldm.embeddings.torch_files import save_legacy
from ldm.images import labelled

# The word "*" is the placeholder nearly everywhere; its ids in CLIP's and BERT's vocabularies.
STAR_IDS = {"clip": 265, "bert": 1008}
_UNKNOWN_TOKEN = -1
_PROGRESS_KEYS = ("progressive_step", "progressive_scale")


def recognise_original(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings of a dict with `string_to_param` by placeholder and no `name`; None for anything else."""
    if "string_to_param" not in payload.names or isinstance(payload.content.get("name"), str):
        return None
    held = payload.content["string_to_param"]
    vectors = as_mapping(held)
    tokens = as_mapping(payload.content.get("string_to_token", {}))
    record = MetadataRecord(payload.content.get(RECORD_KEY))
    progress = Progress.from_values(*(payload.content.get(key) for key in _PROGRESS_KEYS))
    concepts = []
    for index, (trigger, value) in enumerate(vectors.items()):
        # The original itself has 1280-wide vectors for one model only, and always in a ParameterDict.
        wide = (
            isinstance(held, nn.ParameterDict) and isinstance(value, Tensor) and value.shape[-1:] == (1280,)
        )
        concept = record.concept(index, trigger, value, encoder="bert" if wide else None)
        if concept.token is None:
            concept = dataclasses.replace(concept, token=_token_id(tokens.get(trigger)))
        if progress is not None and (used := progress.in_use(len(concept.vectors))) < len(concept.vectors):
            concept = dataclasses.replace(
                concept, vectors=concept.vectors[:used], unused=concept.vectors[used:]
            )
        concepts.append(concept)
    return LearnedEmbeddings(tuple(concepts), record.metadata, "original", progress=progress)


def as_mapping(value: Any) -> dict[str, Any]:
    """A dict from a dict or from a ParameterDict of any torch release (old ones do not know their own keys)."""
    if isinstance(value, nn.ParameterDict):
        inner = value.__dict__.get("_parameters")
        keys = value.__dict__.get("_keys")
        # A ParameterDict keeps tensors that are no Parameter as plain attributes.
        plain = {
            key: value.__dict__[key]
            for key in (keys if isinstance(keys, Mapping) else ())
            if isinstance(value.__dict__.get(key), Tensor)
        }
        value = {**(inner if isinstance(inner, Mapping) else {}), **plain}
    if not isinstance(value, Mapping):
        raise EmbeddingError("its string_to_param is no mapping from words to vectors; it is damaged")
    if len(value) > 4096 or not all(isinstance(key, str) for key in value):
        raise EmbeddingError("its string_to_param does not map words to vectors; it is damaged")
    if not all(tensor is None or isinstance(tensor, (Tensor, int)) for tensor in value.values()):
        raise EmbeddingError("its string_to_param does not map words to tensors; it is damaged")
    return dict(value)


def save_original(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that the original's EmbeddingManager loads; it may hold several triggers.

    Token ids are those the concepts carry, or known for "*"; else -1, which the original cannot match. Unused
    vectors follow those in use, and the progress says how many that are.
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
        RECORD_KEY: record_of(embeddings),
    }
    if embeddings.progress is not None:
        step, scale = embeddings.progress.step, embeddings.progress.scale
        content |= dict(zip(_PROGRESS_KEYS, (step, scale), strict=True))
    torch.save(content, file)


def _parameter_dict(vectors: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """A ParameterDict of any words: by its own interface it takes neither "cat.v2" nor "values"."""
    held = nn.ParameterDict()
    held._parameters.update(vectors)
    held._keys.update(dict.fromkeys(vectors))
    return held


def _token_id(token: Any) -> int | None:
    """The id in a file's `string_to_token`: an integer tensor of one element, or an int."""
    if isinstance(token, Tensor):
        if token.dtype is not torch.int64 or token.numel() != 1 or token.is_meta:
            return None
        token = int(token)
    return token if type(token) is int and 0 <= token < 2**31 else None


# DreamArtist and HCP-Diffusion train a second file for the negative prompt.
_NEGATIVE = ("-neg", "-uc")


def recognise_a1111(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a dict with `string_to_param` and `name`; None for anything else."""
    if "string_to_param" not in payload.names or not isinstance(payload.content.get("name"), str):
        return None
    content = payload.content
    vectors = as_mapping(content["string_to_param"])
    if len(vectors) != 1:
        raise EmbeddingError(f"it names one embedding and holds {len(vectors)}; it is damaged")
    record = MetadataRecord(content.get(RECORD_KEY))
    trigger = _trigger(payload, content["name"])
    concept = record.concept(0, trigger, next(iter(vectors.values())))
    kind = "hcp" if "string_to_token" not in content else "a1111"
    kind = "ai-toolkit" if "software" in content or "notes" in content else kind
    kind = "a1111-png" if payload.container == "picture" else kind
    if not record and payload.path.stem.endswith(_NEGATIVE):
        concept = Concept(concept.trigger, concept.vectors, concept.encoder, part="negative")
    said = Metadata.from_values(
        {
            "steps": content.get("step"),
            "base_model": content.get("sd_checkpoint_name"),
            "base_model_hash": content.get("sd_checkpoint"),
            "tool": {"a1111": "AUTOMATIC1111", "a1111-png": "AUTOMATIC1111", "hcp": "HCP-Diffusion"}.get(
                kind, kind
            ),
        }
    )
    return LearnedEmbeddings((concept,), record.metadata if record else said, kind)


def save_a1111(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write a `.pt` that AUTOMATIC1111's own unpickler lets through; its prompt word is the file's stem."""
    save_legacy(_content(embeddings), file)


def save_a1111_image(
    embeddings: LearnedEmbeddings, file: BinaryIO, preview: Image.Image | None = None
) -> None:
    """Write a PNG to share: the preview (or a picture of the numbers) with the embedding in it."""
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
        # The tool itself always writes "*" here, and diffusers looks for that key.
        "string_to_token": {"*": STAR_IDS["clip"]},
        "string_to_param": {"*": concept.vectors.clone()},
        "name": concept.trigger,
        "step": metadata.steps,
        "sd_checkpoint": metadata.base_model_hash and metadata.base_model_hash[:10],
        "sd_checkpoint_name": metadata.base_model,
        RECORD_KEY: record_of(embeddings),
    }


def _trigger(payload: Payload, name: str) -> str:
    """The prompt word: the file's stem, as in every tool that reads this format.

    A picture is called anything, so there it is the name inside; and a stem like "cat-500" is the name "cat"
    with the step that the training tool appended.
    """
    stem = payload.stem
    appended = re.fullmatch(re.escape(name) + r"-\d+", stem)
    return name if (payload.container == "picture" or appended) and name.strip() else stem


def _heat_map(shades: torch.Tensor) -> Image.Image:
    side = int(len(shades) ** 0.5) or 1
    grey = (shades[: side * side].reshape(side, side) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(grey).resize((256, 256), Image.Resampling.NEAREST).convert("RGB")


def _titled(preview: Image.Image, embeddings: LearnedEmbeddings) -> Image.Image:
    concept, metadata = embeddings.concepts[0], embeddings.metadata
    parts = [concept.trigger, metadata.base_model]
    parts += [metadata.base_model_hash and f"[{metadata.base_model_hash[:10]}]", f"{len(concept.vectors)}v"]
    parts += [metadata.steps is not None and f"{metadata.steps}s"]
    if preview.width < 256:
        preview = preview.resize(
            (256, max(1, 256 * preview.height // preview.width)), Image.Resampling.NEAREST
        )
    return labelled(preview.convert("RGB"), "  ".join(part for part in parts if part))
