"""Learned embeddings put into a model, and prompts checked against them."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ldm.embeddings import LearnedEmbeddings, merge, read
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.util import UserError

# What people write for a learned concept: "<my-cat>", or an asterisk by itself ("2*3" is none).
_LIKE_A_PLACEHOLDER = re.compile(r"<[^<>\s]+>|(?<![\w*])\*(?![\w*])")


def load_embeddings(model: Any, paths: str | Path | Sequence[str | Path]) -> list[str]:
    """Put the vectors of one or several files, of any format, in place of those the model holds.

    A model without embedding manager is given one. A manager of the user's own class, without `take`, loads one file
    of its own format.

    Returns:
        the placeholders, for use in prompts.
    Raises:
        UserError: a file that cannot be read or is for another text encoder, or two with different vectors for one
            placeholder.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    manager = _manager_of(model)
    if not hasattr(manager, "take"):
        if len(paths) != 1:
            raise UserError(f"{type(manager).__name__} loads one embedding file, not {len(paths)}; name one")
        manager.load(paths[0])
        return list(manager.placeholders)
    parts = [_in_use(read(path), path, manager) for path in paths]
    together = merge(parts)
    family = "bert" if isinstance(model.cond_stage_model, BERTEmbedder) else "clip"
    manager.take(together.vectors_for(manager.width, family), source=f"'{together.source}'")
    # what a file holds is in use, also where the config adds vectors progressively
    manager.on_optimizer_step(sys.maxsize)
    # a manager that held nothing knew no device
    manager.to(model.alphas_cumprod.device)
    return list(manager.placeholders)


def check_prompts(model: Any, prompts: Iterable[str], learned: Iterable[str] | None = None) -> None:
    """Raise UserError for a prompt with a placeholder that nothing was learned for.

    `learned` names the placeholders that were, by default all that the model holds.
    """
    manager = getattr(model, "embedding_manager", None)
    held = [] if manager is None else list(manager.placeholders)
    check_mentions(prompts, held if learned is None else learned, held)


def check_mentions(prompts: Iterable[str], learned: Iterable[str], configured: Iterable[str] = ()) -> None:
    """Raise UserError for a prompt with a placeholder that is not `learned`.

    A placeholder is what looks like one ("<my-cat>", a lone "*") and every word of `configured`. No model is needed.
    """
    learned = sorted(learned, key=len, reverse=True)
    unlearned = [whole_word(name) for name in configured if name not in learned]
    suspects = re.compile("|".join([*unlearned, _LIKE_A_PLACEHOLDER.pattern]), re.IGNORECASE)
    known = re.compile("|".join(map(whole_word, learned)) or r"(?!)", re.IGNORECASE)
    for prompt in prompts:
        found = suspects.search(known.sub(" ", prompt))
        if found is not None:
            there = ", ".join(f"'{name}'" for name in learned) or "none"
            raise UserError(
                f"the prompt \"{prompt}\" mentions '{found[0]}', but no loaded embedding has that name "
                f"(loaded: {there}); load its file with --embedding_path, or write the prompt without it"
            )


def whole_word(name: str) -> str:
    """A pattern for the name by itself, not as a part of a longer word."""
    before = r"(?<!\w)" if name[0].isalnum() else ""
    after = r"(?!\w)" if name[-1].isalnum() else ""
    return before + re.escape(name) + after


def _manager_of(model: Any) -> Any:
    manager = getattr(model, "embedding_manager", None)
    if manager is not None:
        return manager
    encoder = getattr(model, "cond_stage_model", None)
    if not hasattr(encoder, "prompt_tokenizer"):
        raise UserError(
            f"this model has no text encoder that takes embeddings ({type(encoder).__name__}); "
            "name a text-to-image model and its config"
        )
    model.embedding_manager = EmbeddingManager(encoder)
    return model.embedding_manager


def _in_use(part: LearnedEmbeddings, path: str | Path, manager: Any) -> LearnedEmbeddings:
    """`part` without the vectors that a progressive run had not come to: the manager knows its own files."""
    if part.format != "original":
        return part
    manager.load(path)
    used = manager.export()
    return dataclasses.replace(
        part, concepts=tuple(dataclasses.replace(c, vectors=used[c.trigger]) for c in part.concepts)
    )
