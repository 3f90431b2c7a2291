"""One key, `emb_params`: the canonical file, and those of kohya, invoke-training and ai-toolkit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

from torch import Tensor

from ldm.embeddings import modelspec
from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings
from ldm.embeddings.kinds import is_ambiguous, kind_of_architecture, models_of
from ldm.embeddings.metadata import Metadata
from ldm.embeddings.own import KEY, Record, record_of
from ldm.embeddings.payload import Payload
from ldm.embeddings.tensorfile import save_tensors

_NAME = "emb_params"


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a file whose key is `emb_params`; None for anything else."""
    if _NAME not in payload.names:
        return None
    vectors = payload.content[_NAME]
    if not isinstance(vectors, Tensor):
        raise EmbeddingError(f"its {_NAME} is no tensor but {type(vectors).__name__}")
    header, record = payload.header, Record(payload.header.get(KEY))
    architecture = header.get("modelspec.architecture", "")
    kind = kind_of_architecture(architecture, vectors.shape[-1] if vectors.ndim else 0)
    concept = record.concept(0, trigger_of(payload), vectors, encoder=kind)
    return LearnedEmbeddings(
        (concept,), record.metadata if record else header_metadata(header), _format(header, bool(record))
    )


def save(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the canonical file: `emb_params` float32 (SDXL: `clip_l` and `clip_g`), ModelSpec and our record.

    Raises EmbeddingError where the width alone cannot say which model the vectors are for.
    """
    for concept in embeddings.concepts:
        if is_ambiguous(concept.encoder, concept.width):
            raise EmbeddingError(
                f"'{concept.trigger}': {concept.width} wide is {models_of(None, concept.width)}, and nothing says "
                "which; give the encoder (convert --encoder bert, or clip_g)"
            )
    tensors = {_NAME: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    header = modelspec.describe(embeddings, tensors) | {"format": "pt", KEY: record_of(embeddings)}
    save_tensors(tensors, header, file)


def trigger_of(payload: Payload) -> str:
    """The trigger of a safetensors file of another tool: its header's, or the file's stem."""
    phrase = payload.header.get("modelspec.trigger_phrase", "")
    name = _json(payload.header.get("name"))
    for said in (phrase, name):
        if isinstance(said, str) and said.strip():
            return said
    return payload.stem


def header_metadata(header: Mapping[str, str]) -> Metadata:
    """What ModelSpec, kohya's `ss_` entries and ai-toolkit's JSON texts say."""
    first = {
        "base_model": ("ss_sd_model_name", "sd_checkpoint_name"),
        "base_model_hash": ("ss_new_sd_model_hash", "ss_sd_model_hash", "sd_checkpoint"),
        "steps": ("ss_steps", "step"),
        "seed": ("ss_seed",),
        "learning_rate": ("ss_learning_rate",),
        "images": ("ss_num_train_images",),
        "tool": ("modelspec.implementation_version", "software"),
        "date": ("modelspec.date",),
    }
    values: dict[str, Any] = {}
    for name, keys in first.items():
        found = next(
            (header[key] for key in keys if header.get(key, "None") not in ("None", "null", "")), None
        )
        value = _json(found)
        if isinstance(value, dict):  # ai-toolkit's software entry: {"name": ..., "version": ...}
            value = value.get("name")
        values[name] = value if isinstance(value, (str, int, float)) else found
    if isinstance(values["base_model_hash"], (int, float)):  # a hash of digits only is still a hash
        values["base_model_hash"] = str(values["base_model_hash"])
    return Metadata.from_values(values)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "") if len(text or "") < 10_000 else None
    except (ValueError, RecursionError):
        return text


def _format(header: Mapping[str, str], ours: bool) -> str:
    if ours:
        return "safetensors"
    if "string_to_param" in header:
        return "ai-toolkit"
    return "kohya" if any(key.startswith(("ss_", "modelspec.")) for key in header) else _NAME
