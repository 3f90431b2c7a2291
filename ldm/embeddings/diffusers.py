"""Files keyed by the word itself: diffusers' `learned_embeds`, and a bare tensor without any word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from torch import Tensor

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings, quoted
from ldm.embeddings.own import KEY, Record, record_of
from ldm.embeddings.payload import Payload
from ldm.embeddings.tensorfile import save_tensors

_MOST_WORDS = 64


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings of `{word: [d] or [N, d], ...}` or of a bare tensor; None for anything else.

    cloneofsimo's `.pt` is the same with several words. Asked last, for any word is a key.
    """
    record = Record(payload.header.get(KEY))
    if isinstance(payload.content, Tensor):
        return LearnedEmbeddings((record.concept(0, payload.stem, payload.content),), format="tensor")
    keys = sorted(payload.names)
    if not keys or not isinstance(payload.content, Mapping) or len(keys) != len(payload.content):
        return None
    if any(_is_weight_name(key) for key in keys) or len(keys) > _MOST_WORDS:
        raise EmbeddingError(f"it is a model or LoRA, not an embedding (it holds {quoted(keys[:3])})")
    values = {key: payload.content[key] for key in payload.content}
    if not all(isinstance(value, Tensor) for value in values.values()):
        return None
    concepts = tuple(record.concept(i, key, value) for i, (key, value) in enumerate(values.items()))
    return LearnedEmbeddings(concepts, record.metadata, "diffusers" if len(keys) == 1 else "word dict")


def save(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write `learned_embeds.safetensors`: one key, the trigger, and [N, d]; one vector as [d].

    Both forms load in diffusers; InvokeAI takes the width from the first dimension, so one vector has one.
    """
    (concept,) = embeddings.concepts
    vectors = concept.vectors[0] if len(concept.vectors) == 1 else concept.vectors
    save_tensors({concept.trigger: vectors}, {"format": "pt", KEY: record_of(embeddings)}, file)


def _is_weight_name(key: str) -> bool:
    ends = (".weight", ".bias", ".alpha", ".lora_down", ".lora_up")
    return key == "state_dict" or key.endswith(ends) or key.startswith(("lora_", "model.", "text_model."))
