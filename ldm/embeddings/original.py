"""The original's `.pt`: two mappings by placeholder, `string_to_token` and `string_to_param`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings
from ldm.embeddings.own import KEY, Record, record_of
from ldm.embeddings.payload import Payload

# The word "*" is the placeholder nearly everywhere; its ids in CLIP's and BERT's vocabularies.
STAR_IDS = {"clip": 265, "bert": 1008}
_UNKNOWN_TOKEN = -1


def recognise(payload: Payload) -> LearnedEmbeddings | None:
    """The embeddings of a dict with `string_to_param` by placeholder and no `name`; None for anything else."""
    if "string_to_param" not in payload.names or isinstance(payload.content.get("name"), str):
        return None
    held = payload.content["string_to_param"]
    vectors = as_mapping(held)
    tokens = as_mapping(payload.content.get("string_to_token", {}))
    record = Record(payload.content.get(KEY))
    concepts = []
    for index, (trigger, value) in enumerate(vectors.items()):
        # The original itself has 1280-wide vectors for one model only, and always in a ParameterDict.
        wide = (
            isinstance(held, nn.ParameterDict) and isinstance(value, Tensor) and value.shape[-1:] == (1280,)
        )
        concept = record.concept(index, trigger, value, encoder="bert" if wide else None)
        if concept.token is None:
            concept = dataclasses.replace(concept, token=_token_id(tokens.get(trigger)))
        concepts.append(concept)
    return LearnedEmbeddings(tuple(concepts), record.metadata, "original")


def as_mapping(value: Any) -> dict[str, Any]:
    """A dict from a dict or from a ParameterDict of any torch release (old ones do not know their own keys)."""
    if isinstance(value, nn.ParameterDict):
        inner = value.__dict__.get("_parameters")
        keys = value.__dict__.get("_keys")
        # A ParameterDict keeps tensors that are no Parameter as plain attributes.
        plain = {
            key: value.__dict__[key]
            for key in (keys if isinstance(keys, Mapping) else ())
            if isinstance(value.__dict__.get(key), Tensor)
        }
        value = {**(inner if isinstance(inner, Mapping) else {}), **plain}
    if not isinstance(value, Mapping):
        raise EmbeddingError("its string_to_param is no mapping from words to vectors; it is damaged")
    if len(value) > 4096 or not all(isinstance(key, str) for key in value):
        raise EmbeddingError("its string_to_param does not map words to vectors; it is damaged")
    if not all(tensor is None or isinstance(tensor, (Tensor, int)) for tensor in value.values()):
        raise EmbeddingError("its string_to_param does not map words to tensors; it is damaged")
    return dict(value)


def save(embeddings: LearnedEmbeddings, file: BinaryIO) -> None:
    """Write the file that the original's EmbeddingManager loads; it may hold several triggers.

    Token ids are those the concepts carry, or known for "*"; else -1, which the original cannot match.
    """
    tokens, vectors = {}, {}
    for concept in embeddings.concepts:
        family = "bert" if concept.encoder == "bert" else "clip"
        star = STAR_IDS[family] if concept.trigger == "*" else _UNKNOWN_TOKEN
        tokens[concept.trigger] = torch.tensor(star if concept.token is None else concept.token)
        vectors[concept.trigger] = nn.Parameter(concept.vectors.clone())
    content = {
        "string_to_token": tokens,
        "string_to_param": _parameter_dict(vectors),
        KEY: record_of(embeddings),
    }
    torch.save(content, file)


def _parameter_dict(vectors: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """A ParameterDict of any words: by its own interface it takes neither "cat.v2" nor "values"."""
    held = nn.ParameterDict()
    held._parameters.update(vectors)
    held._keys.update(dict.fromkeys(vectors))
    return held


def _token_id(token: Any) -> int | None:
    """The id in a file's `string_to_token`: an integer tensor of one element, or an int."""
    if isinstance(token, Tensor):
        if token.dtype is not torch.int64 or token.numel() != 1 or token.is_meta:
            return None
        token = int(token)
    return token if type(token) is int and 0 <= token < 2**31 else None
