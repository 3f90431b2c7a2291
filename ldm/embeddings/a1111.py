"""AUTOMATIC1111's embeddings, `.pt` and PNG; with those of ai-toolkit, HCP-Diffusion and DreamArtist, its kin."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

import torch
from PIL import Image

from ldm.embeddings import picture
from ldm.embeddings.concept import Concept, EmbeddingError, LearnedEmbeddings
from ldm.embeddings.legacy import save_legacy
from ldm.embeddings.metadata import Metadata
from ldm.embeddings.original import STAR_IDS, as_mapping
from ldm.embeddings.own import KEY, Record, record_of
from ldm.embeddings.payload import Payload
from ldm.images import labelled

# DreamArtist and HCP-Diffusion train a second file for the negative prompt.
_NEGATIVE = ("-neg", "-uc")


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a dict with `string_to_param` and `name`; None for anything else."""
    if "string_to_param" not in payload.names or not isinstance(payload.content.get("name"), str):
        return None
    content = payload.content
    vectors = as_mapping(content["string_to_param"])
    if len(vectors) != 1:
        raise EmbeddingError(f"it names one embedding and holds {len(vectors)}; it is damaged")
    record = Record(content.get(KEY))
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


def save(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write a `.pt` that AUTOMATIC1111's own unpickler lets through; its prompt word is the file's stem."""
    save_legacy(_content(embeddings), file)


def save_picture(embeddings: LearnedEmbeddings, file: BinaryIO, preview: Image.Image | None = None) -> None:
    """Write a PNG to share: the preview (or a picture of the numbers) with the embedding in it."""
    concept = embeddings.concepts[0]
    size = concept.vectors.abs()
    shades = (size / size.max().clamp_min(1e-12))[0]
    picture.save(_content(embeddings), _titled(preview or _heat_map(shades), embeddings), shades, file)


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
        KEY: record_of(embeddings),
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
