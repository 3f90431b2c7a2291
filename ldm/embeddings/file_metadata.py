"""Metadata inside embedding files: the JSON record of this project and the ModelSpec 1.0.1 header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from ldm.embeddings.concept import (
    ENCODER_KINDS,
    Concept,
    LearnedEmbeddings,
    Metadata,
    architecture_of,
    is_possible_width,
)

RECORD_KEY = "textual_inversion"
# The format, in the record, of a file of words that are more than vectors; see ldm.embeddings.method_files.
METHOD = "method"
_MAX_CHARACTERS = 2**18


def record_text(embeddings: LearnedEmbeddings, format: str) -> str:
    """Return the JSON text that is written beside the vectors into a file of this format."""
    concepts = [
        {"trigger": c.trigger, "encoder": c.encoder, "part": c.part, "token": c.token}
        for c in embeddings.concepts
    ]
    concepts = [{key: value for key, value in c.items() if value not in (None, "")} for c in concepts]
    values = {"version": 1, "format": format, "concepts": concepts, **embeddings.metadata.known()}
    return json.dumps(values, sort_keys=True)


class MetadataRecord:
    """The JSON record of a file, not trusted; false if the file has none, as those of other tools."""

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
        width = vectors.shape[-1] if isinstance(vectors, Tensor) and vectors.ndim else 0
        kind, part, token = entry.get("encoder"), entry.get("part"), entry.get("token")
        return Concept(
            trigger=entry["trigger"] if isinstance(entry.get("trigger"), str) else trigger,
            vectors=vectors,
            encoder=kind if isinstance(kind, str) and is_possible_width(kind, width) else encoder,
            part=part if part == "negative" else "",
            token=token if type(token) is int and 0 <= token < 2**31 else None,
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
