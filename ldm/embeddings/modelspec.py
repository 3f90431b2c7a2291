"""The ModelSpec 1.0.1 header of a safetensors file, by which model browsers show what it is.

Source: Stability-AI/ModelSpec, the metadata standard for safetensors files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone

from torch import Tensor

from ldm.embeddings.concept import LearnedEmbeddings
from ldm.embeddings.kinds import KINDS, architecture_of


def describe(embeddings: LearnedEmbeddings, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header's texts; the date is the metadata's, or now."""
    widest = max(embeddings.concepts, key=lambda concept: concept.width)
    metadata = embeddings.metadata
    side = metadata.resolution or (KINDS[widest.encoder].resolution if widest.encoder in KINDS else None)
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
    """SHA-256 of the numbers as the file holds them: one tensor after another, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
