"""Formats that are named tensors: emb_params, OneTrainer, diffusers, SDXL pairs, XTI, and embeddings inside a LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

from torch import Tensor

from ldm.embeddings import records
from ldm.embeddings.concept import (
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    is_ambiguous,
    kind_of_architecture,
    models_of,
    quoted,
)
from ldm.embeddings.payload import Payload, save_tensors
from ldm.embeddings.records import RECORD_KEY, MetadataRecord, record_of

_EMB_PARAMS = "emb_params"


def recognise_emb_params(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a file whose key is `emb_params`; None for anything else."""
    if _EMB_PARAMS not in payload.names:
        return None
    vectors = payload.content[_EMB_PARAMS]
    if not isinstance(vectors, Tensor):
        raise EmbeddingError(f"its {_EMB_PARAMS} is no tensor but {type(vectors).__name__}")
    header, record = payload.header, MetadataRecord(payload.header.get(RECORD_KEY))
    architecture = header.get("modelspec.architecture", "")
    kind = kind_of_architecture(architecture, vectors.shape[-1] if vectors.ndim else 0)
    concept = record.concept(0, trigger_of(payload), vectors, encoder=kind)
    return LearnedEmbeddings(
        (concept,), record.metadata if record else header_metadata(header), _format(header, bool(record))
    )


def save_emb_params(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the canonical file: `emb_params` float32 (SDXL: `clip_l` and `clip_g`), ModelSpec and our record.

    Raises EmbeddingError where the width alone cannot say which model the vectors are for.
    """
    for concept in embeddings.concepts:
        if is_ambiguous(concept.encoder, concept.width):
            raise EmbeddingError(
                f"'{concept.trigger}': {concept.width} wide is {models_of(None, concept.width)}, and nothing says "
                "which; give the encoder (convert --encoder bert, or clip_g)"
            )
    tensors = {_EMB_PARAMS: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    header = records.modelspec_header(embeddings, tensors) | {
        "format": "pt",
        RECORD_KEY: record_of(embeddings),
    }
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
    return "kohya" if any(key.startswith(("ss_", "modelspec.")) for key in header) else _EMB_PARAMS


_EMP_PARAMS = "emp_params"
_EMP_PARAMS_OUT = f"{_EMP_PARAMS}_out"


def recognise_onetrainer(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding of a file with `emp_params`, and its `emp_params_out`; None for anything else."""
    if _EMP_PARAMS not in payload.names:
        return None
    record = MetadataRecord(payload.header.get(RECORD_KEY))
    trigger = trigger_of(payload)
    concepts = [record.concept(0, trigger, payload.content[_EMP_PARAMS])]
    if _EMP_PARAMS_OUT in payload.names:
        first = concepts[0]
        concepts.append(
            Concept(first.trigger, payload.content[_EMP_PARAMS_OUT], first.encoder, part="output")
        )
    return LearnedEmbeddings(tuple(concepts), record.metadata, "onetrainer")


def save_onetrainer(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that OneTrainer continues from (SDXL: `clip_l` and `clip_g`)."""
    tensors = {_EMP_PARAMS: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    save_tensors(tensors, {RECORD_KEY: record_of(embeddings)}, file)


_ENCODER_KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5", "t5xxl": "t5"}
# Replicate's trainer numbers the encoders, oss-roettger's SDXL files call them so.
_NUMBERED = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_ROETTGER = {"emb": "clip_l", "emb2": "clip_g"}
_REPLICATE_NAMES = "special_params.json"


def recognise_by_encoder(payload: Payload) -> LearnedEmbeddings | None:
    """The embedding whose keys are names of text encoders; None for anything else."""
    keys = payload.names
    if keys & set(_NUMBERED) and keys <= set(_NUMBERED):
        return _replicate(payload)
    if keys == set(_ROETTGER):
        return LearnedEmbeddings(_concepts(payload, _ROETTGER, payload.stem), format="roettger")
    outputs = {f"{name}_out": encoder for name, encoder in _ENCODER_KEYS.items()}
    if not keys & set(_ENCODER_KEYS) or not keys <= set(_ENCODER_KEYS) | set(outputs):
        return None
    record = MetadataRecord(payload.header.get(RECORD_KEY))
    concepts = []
    for key in sorted(keys, key=lambda name: (name.endswith("_out"), name)):
        encoder = _ENCODER_KEYS.get(key) or outputs[key]
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


_LAYER = re.compile(r"(IN|OUT)\d\d|MID")


def recognise_xti(payload: Payload) -> LearnedEmbeddings | None:
    """The vectors of every layer, `part` naming the layer; None for anything else."""
    keys = payload.names
    if len(keys) < 2 or not all(_LAYER.fullmatch(key) for key in keys):
        return None
    trigger = trigger_of(payload)
    concepts = tuple(Concept(trigger, payload.content[key], part=key) for key in sorted(keys))
    return LearnedEmbeddings(concepts, header_metadata(payload.header), "xti")


_BUNDLED = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<key>clip_l|clip_g|t5|emp_params|string_to_param\.[^.]+)(?P<out>_out)?"
)
_LORA_ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5"}


def recognise_lora(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings among a LoRA's tensors, which are left alone; None if there are none."""
    marked = [key for key, value in payload.header.items() if value == "<embed>" and key in payload.names]
    if marked:
        concepts = tuple(Concept(key, payload.content[key]) for key in sorted(marked))
        return LearnedEmbeddings(concepts, format="cloneofsimo")
    found = [(key, match) for key in sorted(payload.names) if (match := _BUNDLED.fullmatch(key))]
    if not found:
        return None
    concepts = tuple(
        Concept(
            match["word"],
            payload.content[key],
            _LORA_ENCODERS.get(match["key"]),
            part="output" if match["out"] else "",
        )
        for key, match in found
    )
    return LearnedEmbeddings(concepts, format="onetrainer bundle")


_MOST_WORDS = 64


def recognise_diffusers(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings of `{word: [d] or [N, d], ...}` or of a bare tensor; None for anything else.

    cloneofsimo's `.pt` is the same with several words. Asked last, for any word is a key.
    """
    record = MetadataRecord(payload.header.get(RECORD_KEY))
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


def save_diffusers(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write `learned_embeds.safetensors`: one key, the trigger, and [N, d]; one vector as [d].

    Both forms load in diffusers; InvokeAI takes the width from the first dimension, so one vector has one.
    """
    (concept,) = embeddings.concepts
    vectors = concept.vectors[0] if len(concept.vectors) == 1 else concept.vectors
    save_tensors({concept.trigger: vectors}, {"format": "pt", RECORD_KEY: record_of(embeddings)}, file)


def _is_weight_name(key: str) -> bool:
    ends = (".weight", ".bias", ".alpha", ".lora_down", ".lora_up")
    return key == "state_dict" or key.endswith(ends) or key.startswith(("lora_", "model.", "text_model."))
