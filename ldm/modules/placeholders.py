"""Which placeholders there are, and how many vectors each has: what a YAML says, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.modules.tokens import PromptTokenizer
from ldm.util import UserError

_DOT, _TAKEN = "\ue02e", "\ue000"  # private characters, which no prompt holds
_TAKEN_NAMES = frozenset(dir(nn.ParameterDict())) | frozenset(dir(nn.Module()))


def parameter_key(placeholder: str) -> str:
    """The name of a placeholder in a state dict: its own, but for dots and names such as "train"."""
    key = placeholder.replace(".", _DOT)
    return _TAKEN + key if key in _TAKEN_NAMES else key


def as_list(value: Any) -> list[Any]:
    """A list from a YAML's list, a single string or nothing."""
    return [value] if isinstance(value, str) else list(value or ())


def check_placeholders(strings: Sequence[str], tokenizer: PromptTokenizer) -> None:
    """Raise UserError for a placeholder that is no text, is blank, or reads as another one does."""
    seen: dict[str, str] = {}
    for string in strings:
        if not isinstance(string, str):
            raise UserError(f"placeholder {string!r} is not a text; put it in quotes")
        if not string.strip():
            raise UserError(f"placeholder '{string}' is empty; choose a word such as '*'")
        if string != string.strip():
            raise UserError(f"placeholder '{string}' begins or ends in a space; write it without")
        folded = tokenizer.folded(string)
        if folded in seen:
            raise UserError(
                f"placeholder '{string}' is there twice, first as '{seen[folded]}'; choose another word"
            )
        seen[folded] = string


def vector_counts(
    configured: Sequence[str],
    every: Sequence[str],
    wanted: int | Sequence[int] | Mapping[str, int],
    limit: int,
) -> dict[str, int]:
    """The number of vectors of each placeholder of `every`, which begins with the `configured` ones.

    A list counts the configured ones in order, a mapping names them; those not counted have one vector.
    """
    if isinstance(wanted, Mapping):
        strangers = [string for string in wanted if string not in every]
        if strangers:
            raise UserError(f"num_vectors_per_token names '{strangers[0]}', which is no placeholder")
        counts = {string: wanted.get(string, 1) for string in every}
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if len(wanted) != len(configured):
            raise UserError(
                f"num_vectors_per_token has {len(wanted)} entries for {len(configured)} placeholder_strings; "
                f"give one for each"
            )
        counts = dict.fromkeys(every, 1) | dict(zip(configured, wanted, strict=True))
    else:
        counts = dict.fromkeys(every, wanted)
    for string, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= limit:
            raise UserError(f"num_vectors_per_token of '{string}' is {count}; use a number from 1 to {limit}")
    return counts
