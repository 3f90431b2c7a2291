"""Metadata as embedding files carry it: our own JSON record and the ModelSpec 1.0.1 header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from ldm.embeddings.concept import KINDS, Concept, LearnedEmbeddings, Metadata, architecture_of, fits

RECORD_KEY = "textual_inversion"
_MAX_CHARACTERS = 2**18


def record_of(embeddings: LearnedEmbeddings) -> str:
    """The JSON text that goes into a file beside the vectors."""
    concepts = [
        {"trigger": c.trigger, "encoder": c.encoder, "part": c.part, "token": c.token}
        for c in embeddings.concepts
    ]
    concepts = [{key: value for key, value in c.items() if value not in (None, "")} for c in concepts]
    return json.dumps({"version": 1, "concepts": concepts, **embeddings.metadata.known()}, sort_keys=True)


class MetadataRecord:
    """What our record in a file says; empty for a file of another tool. Nothing in it is trusted."""

    def __init__(self, text: Any) -> None:
        self._values: Mapping[str, Any] = {}
        if isinstance(text, str) and len(text) <= _MAX_CHARACTERS:
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                values = None
            self._values = values if isinstance(values, dict) else {}

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def metadata(self) -> Metadata:
        return Metadata.from_values(self._values)

    def concept(self, index: int, trigger: str, vectors: Tensor, encoder: str | None = None) -> Concept:
        """The concept of these vectors, with what the record says of the index-th in place of the given."""
        concepts = self._values.get("concepts")
        said = concepts[index] if isinstance(concepts, list) and index < len(concepts) else None
        said = said if isinstance(said, dict) else {}
        width = vectors.shape[-1] if isinstance(vectors, Tensor) and vectors.ndim else 0
        kind, part, token = said.get("encoder"), said.get("part"), said.get("token")
        return Concept(
            trigger=said["trigger"] if isinstance(said.get("trigger"), str) else trigger,
            vectors=vectors,
            encoder=kind if isinstance(kind, str) and fits(kind, width) else encoder,
            part=part if part == "negative" else "",
            token=token if type(token) is int and 0 <= token < 2**31 else None,
        )


def modelspec_header(embeddings: LearnedEmbeddings, tensors: Mapping[str, Tensor]) -> dict[str, str]:
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
