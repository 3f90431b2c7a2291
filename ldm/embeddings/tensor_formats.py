"""Formats of named tensors: emb_params, OneTrainer, diffusers, SDXL pairs, XTI, and embeddings inside a LoRA."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

from ldm.embeddings.concept import (
    ENCODER_KINDS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Metadata,
    is_possible_width,
    kind_of_architecture,
    quoted,
)
from ldm.embeddings.payload import RECORD_KEY, Payload, modelspec_header, record_text, save_tensors
from ldm.outlines import is_tensor
from ldm.words import MAX_LENGTH

_EMB_PARAMS = "emb_params"


def parse_emb_params(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embedding of a file with the key `emb_params`; None for other files."""
    if _EMB_PARAMS not in payload.names:
        return None
    vectors = payload.content[_EMB_PARAMS]
    if not is_tensor(vectors):
        raise EmbeddingError(f"its {_EMB_PARAMS} is not a tensor but {type(vectors).__name__}")
    header, record = payload.header, payload.record
    architecture = header.get("modelspec.architecture", "")
    kind = kind_of_architecture(architecture, vectors.shape[-1] if vectors.ndim else 0)
    concept = record.concept(0, trigger_of(payload), vectors, encoder=kind)
    return LearnedEmbeddings(
        (concept,), record.metadata if record else header_metadata(header), _format(header, bool(record))
    )


def save_emb_params(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write our default format: `emb_params` float32 (SDXL: `clip_l` and `clip_g`), ModelSpec and our record."""
    tensors = {_EMB_PARAMS: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    header = modelspec_header(embeddings, tensors) | {
        "format": "pt",
        RECORD_KEY: record_text(embeddings, "safetensors"),
    }
    save_tensors(tensors, header, file)


def trigger_of(payload: Payload) -> str:
    """Return the trigger of a safetensors file of another tool: from its header, else the file's stem."""
    phrase = payload.header.get("modelspec.trigger_phrase", "")
    name = _json(payload.header.get("name"))
    # Other tools write any text of the user there, which may be a whole sentence.
    usable = (
        trigger for trigger in (phrase, name) if isinstance(trigger, str) and len(trigger) <= MAX_LENGTH
    )
    return next((trigger for trigger in usable if trigger.strip()), payload.stem)


def header_metadata(header: Mapping[str, str]) -> Metadata:
    """Return the metadata in ModelSpec entries, kohya's `ss_` entries and ai-toolkit's JSON texts."""
    keys_of = {
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
    for name, keys in keys_of.items():
        found = next(
            (header[key] for key in keys if header.get(key, "None") not in ("None", "null", "")), None
        )
        value = _json(found)
        if isinstance(value, dict):  # ai-toolkit's software entry: {"name": ..., "version": ...}
            value = value.get("name")
        values[name] = value if isinstance(value, (str, int, float)) else found
    if isinstance(values["base_model_hash"], (int, float)):  # a hash of digits only was parsed as a number
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


def parse_onetrainer(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embedding of a file with the key `emp_params` (and `emp_params_out`); None for other files."""
    if _EMP_PARAMS not in payload.names:
        return None
    record = payload.record
    trigger = trigger_of(payload)
    concepts = [record.concept(0, trigger, payload.content[_EMP_PARAMS])]
    if _EMP_PARAMS_OUT in payload.names:
        first = concepts[0]
        concepts.append(
            Concept(first.trigger, payload.content[_EMP_PARAMS_OUT], first.encoder, part="output")
        )
    return LearnedEmbeddings(tuple(concepts), record.metadata, "onetrainer")


def save_onetrainer(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that OneTrainer reads (SDXL: `clip_l` and `clip_g`)."""
    tensors = {_EMP_PARAMS: embeddings.concepts[0].vectors}
    if len(embeddings.concepts) > 1:
        tensors = {str(concept.encoder): concept.vectors for concept in embeddings.concepts}
    save_tensors(tensors, {RECORD_KEY: record_text(embeddings, "onetrainer")}, file)


_ENCODER_KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5", "t5xxl": "t5"}
_ORDER = list(_ENCODER_KEYS)
# What AUTOMATIC1111 and tools based on it write beside the vectors.
_BESIDE = {"name", "step", "sd_checkpoint", "sd_checkpoint_name", "notes", RECORD_KEY}
# The keys of Replicate's trainer, and of oss-roettger's SDXL files.
_NUMBERED = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_ROETTGER = {"emb": "clip_l", "emb2": "clip_g"}
_REPLICATE_NAMES = "special_params.json"


def parse_by_encoder(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embedding of a file whose keys are names of text encoders; None for other files."""
    keys = payload.names
    if keys & set(_NUMBERED) and keys <= set(_NUMBERED):
        return _replicate(payload)
    if keys == set(_ROETTGER):
        return LearnedEmbeddings(_concepts(payload, _ROETTGER, payload.stem), format="roettger")
    outputs = {f"{name}_out": encoder for name, encoder in _ENCODER_KEYS.items()}
    vectors = keys & (set(_ENCODER_KEYS) | set(outputs))
    if not keys & set(_ENCODER_KEYS) or not keys <= vectors | _BESIDE:
        return None
    if len(keys) == 1 and _is_word_of_diffusers(payload, min(keys)):
        return None
    record, beside = payload.record, payload.content if payload.container != "safetensors" else {}
    name = beside.get("name")
    concepts = []
    for key in sorted(vectors, key=lambda name: (name.endswith("_out"), _ORDER.index(name.split("_out")[0]))):
        encoder = _ENCODER_KEYS.get(key) or outputs[key]
        concept = Concept(
            name if isinstance(name, str) else trigger_of(payload), payload.content[key], encoder
        )
        recorded = record.concept(0, concept.trigger, concept.vectors, encoder)
        part = "output" if key in outputs else recorded.part
        concepts.append(dataclasses.replace(recorded, vectors=concept.vectors, encoder=encoder, part=part))
    metadata = record.metadata if record else header_metadata(payload.header)
    kind = "sdxl pair" if {"clip_l", "clip_g"} <= keys else "by encoder"
    return LearnedEmbeddings(tuple(concepts), metadata, record.format or ("safetensors" if record else kind))


def _is_word_of_diffusers(payload: Payload, key: str) -> bool:
    """Whether the only key of a file, the name of an encoder, is a word, because that encoder has another width."""
    shape = payload.shapes.get(key, ())
    return bool(shape) and not is_possible_width(_ENCODER_KEYS.get(key, ""), shape[-1])


def _concepts(payload: Payload, encoders: dict[str, str], trigger: str) -> tuple[Concept, ...]:
    return tuple(
        Concept(trigger, payload.content[key], encoder)
        for key, encoder in encoders.items()
        if key in payload.names
    )


def _replicate(payload: Payload) -> LearnedEmbeddings:
    """Return the embeddings of Replicate's `.pti`; a JSON file beside it names the rows of each word."""
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


def is_xti(keys: Collection[str]) -> bool:
    """Return whether the names in a file are those of layers."""
    return len(keys) > 1 and all(_LAYER.fullmatch(key) for key in keys)


def layers_of_xti(payload: Payload) -> dict[str, Concept]:
    """Return the vectors of an XTI file by the name of the layer."""
    trigger = trigger_of(payload)
    return {key: Concept(trigger, payload.content[key]) for key in sorted(payload.names)}


_BUNDLED = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?P<key>clip_l|clip_g|t5|emp_params|string_to_param\.[^.]+)(?P<out>_out)?"
)
_LORA_ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5"}


def parse_lora(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embeddings in a LoRA file, whose other tensors are not read; None if there are none."""
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
# The vectors of CLIP's tokens have norms near 0.4, those of its image features near 10.
_LARGEST_NORM = 4.0


def parse_diffusers(payload: Payload) -> LearnedEmbeddings | None:
    """Return the embeddings of `{word: [d] or [N, d], ...}` or of a single tensor; None for other files.

    cloneofsimo's `.pt` is the same with several words. It must be tried last, because any word can be a key.
    """
    record = payload.record
    if is_tensor(payload.content):
        concept = record.concept(0, payload.stem, payload.content)
        norm = concept.vectors.norm() if tuple(concept.vectors.shape) == (1, 768) else None
        if norm is not None and norm > _LARGEST_NORM:
            raise EmbeddingError(
                f"it is a bare vector of norm {norm:.1f}, an aesthetic gradient (the mean of CLIP's "
                "image features), not an embedding of a word; name a file of textual inversion"
            )
        return LearnedEmbeddings((concept,), format="tensor")
    keys = sorted(payload.names)
    if not keys or not isinstance(payload.content, Mapping) or len(keys) != len(payload.content):
        return None
    if not record and not _are_words(payload):
        raise EmbeddingError(f"it is a model or LoRA, not an embedding (it holds {quoted(keys[:3])})")
    values = {key: payload.content[key] for key in payload.content}
    if not all(is_tensor(value) for value in values.values()):
        return None
    second = _SECOND_FILE.search(payload.path.stem)
    concepts = tuple(
        record.concept(i, key, value, encoder="clip_g" if second and value.shape[-1:] == (1280,) else None)
        for i, (key, value) in enumerate(values.items())
    )
    return LearnedEmbeddings(concepts, record.metadata, "diffusers" if len(keys) == 1 else "word dict")


# diffusers writes a word of SDXL as two files: learned_embeds, and learned_embeds_2 for the second encoder.
_SECOND_FILE = re.compile(r"_2(-steps-\d+)?$")
SECOND_FILE = "_2"


def save_diffusers(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write `learned_embeds.safetensors`: the trigger is the key of [N, d].

    Readers count the tokens by the first dimension. Raises EmbeddingError for the one word that cannot be a key.
    """
    (concept,) = embeddings.concepts
    if concept.trigger == _RESERVED_KEY:
        raise EmbeddingError(f"safetensors files reserve the name '{_RESERVED_KEY}'; give another word")
    header = {"format": "pt", RECORD_KEY: record_text(embeddings, "diffusers")}
    save_tensors({concept.trigger: concept.vectors}, header, file)


_RESERVED_KEY = "__metadata__"


def _are_words(payload: Payload) -> bool:
    """Whether the keys of a file can be words: there are few, and their vectors have an encoder's width or no key is
    like the name of a model's weight."""
    widths = {kind.width for kind in ENCODER_KINDS.values()}
    shapes = [payload.shapes.get(key, ()) for key in payload.names]
    if len(shapes) > _MOST_WORDS:
        return False
    if all(shape[-1:] and shape[-1] in widths and len(shape) <= 2 and shape[0] > 0 for shape in shapes):
        return True
    return not any(_is_weight_name(key) for key in payload.names)


def _is_weight_name(key: str) -> bool:
    ends = (".weight", ".bias", ".alpha", ".lora_down", ".lora_up")
    return key == "state_dict" or key.endswith(ends) or key.startswith(("lora_", "model.", "text_model."))
