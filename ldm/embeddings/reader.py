"""Reading the embedding files of all tools."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings, quoted
from ldm.embeddings.payload import Payload, open_payload
from ldm.embeddings.pickle_formats import parse_a1111, parse_original
from ldm.embeddings.tensor_formats import (
    parse_by_encoder,
    parse_diffusers,
    parse_emb_params,
    parse_lora,
    parse_onetrainer,
    parse_xti,
)
from ldm.util import UserError

# Tried in this order; the last accepts any key as a trigger.
_PARSERS = (
    parse_original,
    parse_a1111,
    parse_lora,
    parse_by_encoder,
    parse_xti,
    parse_onetrainer,
    parse_emb_params,
    parse_diffusers,
)
# The parsers of what this project writes, by the format in the file's record: any word can be a key there.
_OWN_PARSERS = {
    "original": (parse_original,),
    "safetensors": (parse_by_encoder, parse_emb_params),
    "diffusers": (parse_diffusers,),
    "a1111": (parse_a1111, parse_by_encoder),
    "a1111-png": (parse_a1111, parse_by_encoder),
    "onetrainer": (parse_by_encoder, parse_onetrainer),
}


def read(path: str | Path) -> LearnedEmbeddings:
    """Read an embedding file of any known format, which is recognised by its content.

    Nothing in the file is run, imported or used as a path. Raises EmbeddingError, one line with the path and the
    reason, if the file is missing, damaged, too large, unknown or malicious.
    """
    path = Path(path)
    try:
        payload = open_payload(path)
        parsers = _OWN_PARSERS.get(payload.record.format or "", _PARSERS)
        found = next((found for parse in parsers if (found := parse(payload))), None)
        if found is None:
            raise EmbeddingError(_unknown(payload))
        return dataclasses.replace(found, source=path.name)
    except UserError as error:
        raise EmbeddingError(f"'{path}': {error}") from error
    except OSError as error:
        raise EmbeddingError(f"'{path}': cannot be read ({error.strerror or error})") from error


def _unknown(payload: Payload) -> str:
    keys = payload.names
    if keys == {"hash", "optimizer_state_dict"}:
        return "it is the optimizer state beside an AUTOMATIC1111 embedding; name the embedding itself"
    if "state_dict" in keys:
        return "it is a model checkpoint, not an embedding"
    holds = f"holds {quoted(sorted(keys))}" if keys else f"is a {type(payload.content).__name__}"
    return f"it is not a known embedding format: it {holds}"
