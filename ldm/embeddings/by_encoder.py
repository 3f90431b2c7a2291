"""Files keyed by the text encoder: SDXL's pair `clip_l` and `clip_g`, and other models of several encoders."""

from __future__ import annotations

import json
import re

from ldm.embeddings.concept import Concept, LearnedEmbeddings
from ldm.embeddings.emb_params import header_metadata, trigger_of
from ldm.embeddings.own import KEY, Record
from ldm.embeddings.payload import Payload

_ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5", "t5xxl": "t5"}
# Replicate's trainer numbers the encoders, oss-roettger's SDXL files call them so.
_NUMBERED = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_ROETTGER = {"emb": "clip_l", "emb2": "clip_g"}
_REPLICATE_NAMES = "special_params.json"


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding whose keys are names of text encoders; None for anything else."""
    keys = payload.names
    if keys & set(_NUMBERED) and keys <= set(_NUMBERED):
        return _replicate(payload)
    if keys == set(_ROETTGER):
        return LearnedEmbeddings(_concepts(payload, _ROETTGER, payload.stem), format="roettger")
    outputs = {f"{name}_out": encoder for name, encoder in _ENCODERS.items()}
    if not keys & set(_ENCODERS) or not keys <= set(_ENCODERS) | set(outputs):
        return None
    record = Record(payload.header.get(KEY))
    concepts = []
    for key in sorted(keys, key=lambda name: (name.endswith("_out"), name)):
        encoder = _ENCODERS.get(key) or outputs[key]
        concept = Concept(trigger_of(payload), payload.content[key], encoder)
        said = record.concept(0, concept.trigger, concept.vectors, encoder)
        part = "output" if key in outputs else said.part
        concepts.append(Concept(said.trigger, concept.vectors, encoder, part))
    metadata = record.metadata if record else header_metadata(payload.header)
    kind = "safetensors" if record else "sdxl pair" if {"clip_l", "clip_g"} <= keys else "by encoder"
    return LearnedEmbeddings(tuple(concepts), metadata, kind)


def _concepts(payload: Payload, encoders: dict[str, str], trigger: str) -> tuple[Concept, ...]:
    return tuple(
        Concept(trigger, payload.content[key], encoder)
        for key, encoder in encoders.items()
        if key in payload.names
    )


def _replicate(payload: Payload) -> LearnedEmbeddings:
    """Replicate's `.pti`: rows by number, and beside it a JSON file that says which rows make which word."""
    whole = _concepts(payload, _NUMBERED, payload.stem)
    concepts = [
        Concept(word, concept.vectors[rows], concept.encoder)
        for word, rows in _replicate_words(payload, len(whole[0].vectors)).items()
        for concept in whole
    ]
    return LearnedEmbeddings(tuple(concepts) or whole, format="replicate")


def _replicate_words(payload: Payload, count: int) -> dict[str, list[int]]:
    names = payload.path.with_name(_REPLICATE_NAMES)
    if not names.is_file() or names.stat().st_size > 100_000:
        return {}
    try:
        words = json.loads(names.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(words, dict) or not all(isinstance(tokens, str) for tokens in words.values()):
        return {}
    rows = {word: [int(n) for n in re.findall(r"<s(\d{1,4})>", tokens)] for word, tokens in words.items()}
    return {word: numbers for word, numbers in rows.items() if numbers and max(numbers) < count}
