"""Reading an embedding file of any tool."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings, quoted
from ldm.embeddings.payload import Payload, open_payload
from ldm.embeddings.pickle_formats import recognise_a1111, recognise_original
from ldm.embeddings.tensor_formats import (
    recognise_by_encoder,
    recognise_diffusers,
    recognise_emb_params,
    recognise_lora,
    recognise_onetrainer,
    recognise_xti,
)

# Asked in this order; the last takes any word for a key.
_FAMILIES = (
    recognise_original,
    recognise_a1111,
    recognise_lora,
    recognise_by_encoder,
    recognise_xti,
    recognise_onetrainer,
    recognise_emb_params,
    recognise_diffusers,
)


def read(path: str | Path) -> LearnedEmbeddings:
    """Read an embedding file, told by its content, of any format that `ldm.embeddings` knows.

    Nothing in the file is run, imported or used as a path. Raises EmbeddingError, one line that names the file
    and the reason, for files that are missing, damaged, too large, unknown or malicious.
    """
    path = Path(path)
    try:
        payload = open_payload(path)
        found = next((found for recognise in _FAMILIES if (found := recognise(payload))), None)
        if found is None:
            raise EmbeddingError(_unknown(payload))
        return dataclasses.replace(found, source=path.name)
    except EmbeddingError as error:
        raise EmbeddingError(_one_line(f"'{path}': {error}")) from error
    except OSError as error:
        raise EmbeddingError(f"'{path}': cannot be read ({error.strerror or error})") from error


def _one_line(message: str) -> str:
    """The message without what a damaged file may have put into a library's own words: breaks, terminal codes."""
    return "".join(c if c.isprintable() else "?" for c in message)


def _unknown(payload: Payload) -> str:
    keys = payload.names
    if keys == {"hash", "optimizer_state_dict"}:
        return "it is the optimizer state beside an AUTOMATIC1111 embedding; name the embedding itself"
    if "state_dict" in keys:
        return "it is a model checkpoint, not an embedding"
    holds = f"holds {quoted(sorted(keys))}" if keys else f"is a {type(payload.content).__name__}"
    return f"it is of an unknown kind: it {holds}"
