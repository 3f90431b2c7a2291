"""Reading the embedding files of all tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ldm.embeddings.concept import EmbeddingError, LearnedEmbeddings, quoted
from ldm.embeddings.payload import METHOD, Payload, more_than_vectors, open_payload
from ldm.embeddings.pickle_formats import parse_a1111, parse_original
from ldm.embeddings.tensor_formats import (
    is_xti,
    parse_by_encoder,
    parse_diffusers,
    parse_emb_params,
    parse_lora,
    parse_onetrainer,
)
from ldm.front_ends import setting
from ldm.model_kinds import NAME_AS_MODEL, no_embedding
from ldm.util import UserError
from ldm.words import own_words

# Tried in this order; the last accepts any key as a trigger.
_PARSERS = (
    parse_original,
    parse_a1111,
    parse_by_encoder,
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


def read(
    path: str | Path, instead: str = "generate and evaluate with them here", numbers: bool = True
) -> LearnedEmbeddings:
    """Read an embedding file of any known format, which is recognised by its content.

    Nothing in the file is run, imported or used as a path. Raises EmbeddingError, one line with the path and the
    reason, if the file is missing, damaged, too large, unknown or malicious, or holds words of a method that are more
    than vectors (see `ldm.embeddings.method_files`); `instead` ends the line for the latter. Without `numbers` the
    vectors are `ldm.outlines.Unread`, and torch, which takes seconds to import, is not needed.
    """
    path = Path(path)
    try:
        payload = open_payload(path, numbers)
        if payload.record.format == METHOD:
            raise EmbeddingError(more_than_vectors(payload.record.values.get("method"), instead))
        if is_xti(payload.names):
            raise EmbeddingError(more_than_vectors("xti", instead))
        return dataclasses.replace(_parse(payload), source=path.name)
    except UserError as error:
        raise EmbeddingError(f"'{path}': {error}") from error
    except OSError as error:
        raise EmbeddingError(f"'{path}': cannot be read ({error.strerror or error})") from error


def read_to_begin(path: str | Path, numbers: bool = True) -> LearnedEmbeddings:
    """Read the file that training begins from; as `read`."""
    return read(
        path, "begin from them with the personalization that learned them, or name a file of vectors", numbers
    )


def chosen(
    learned: LearnedEmbeddings, placeholders: Sequence[str], source: str, optional: Sequence[str] = ()
) -> LearnedEmbeddings:
    """The words of an embedding file under the names of placeholders: by name, or the only word as the only one.

    The negative of a word (see `ldm.words.NEGATIVE`) goes with it. Words that are neither placeholders nor `optional`
    are left out.

    Raises:
        UserError: it has several words and not every placeholder; the message names `source`.
    """
    only, asked = own_words(learned.triggers), own_words(placeholders)
    if len(only) == len(asked) == 1 and asked[0] not in learned.triggers:
        learned = learned.renamed({only[0]: asked[0]})
    held, absent = learned.triggers, [string for string in placeholders if string not in learned.triggers]
    if absent:
        words = (
            "', '".join(word[:30] for word in held[:4]) + "'" + f" and {len(held) - 4} more" * (len(held) > 4)
        )
        raise UserError(
            f"embedding file '{source}' holds no '{absent[0]}', only '{words}; give a word of the file with "
            f"{setting('placeholder')}, or name another file"
        )
    return dataclasses.replace(
        learned, concepts=tuple(c for c in learned.concepts if c.trigger in (*placeholders, *optional))
    )


def _parse(payload: Payload) -> LearnedEmbeddings:
    parsers = _OWN_PARSERS.get(payload.record.format or "")
    if parsers is None:
        if (found := parse_lora(payload)) is not None:
            return found
        if (why := no_embedding(payload.shapes)) is not None:
            raise EmbeddingError(why)
        if "state_dict" in payload.names and "state_dict" not in payload.shapes:
            raise EmbeddingError(f"it is a model checkpoint, not an embedding; {NAME_AS_MODEL}")
        parsers = _PARSERS
    found = next((found for parse in parsers if (found := parse(payload))), None)
    if found is None:
        raise EmbeddingError(_unknown(payload))
    return found


def _unknown(payload: Payload) -> str:
    keys = payload.names
    if keys == {"hash", "optimizer_state_dict"}:
        return "it is the optimizer state beside an AUTOMATIC1111 embedding; name the embedding itself"
    if not keys and not payload.content:
        return "it holds no tensors; it was saved without the word's vectors, so name another file"
    holds = (
        f"holds {quoted(sorted(keys))}"
        if keys
        else f"is a {type(payload.content).__name__} without named tensors"
    )
    return f"it is not a known embedding format: it {holds}; name a file of textual inversion"
