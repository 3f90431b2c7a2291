"""Our own record inside embedding files: one JSON text with the triggers, their encoders and the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.embeddings.concept import Concept, LearnedEmbeddings
from ldm.embeddings.kinds import fits
from ldm.embeddings.metadata import Metadata

KEY = "textual_inversion"
_MAX_CHARACTERS = 2**18


def record_of(embeddings: LearnedEmbeddings) -> str:
    """The JSON text that goes into a file beside the vectors."""
    concepts = [
        {"trigger": c.trigger, "encoder": c.encoder, "part": c.part, "token": c.token}
        for c in embeddings.concepts
    ]
    concepts = [{key: value for key, value in c.items() if value not in (None, "")} for c in concepts]
    return json.dumps({"version": 1, "concepts": concepts, **embeddings.metadata.known()}, sort_keys=True)


class Record:
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
