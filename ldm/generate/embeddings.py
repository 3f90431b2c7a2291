"""Loads learned embeddings into a model, and checks prompts for placeholders without an embedding."""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.embeddings import LearnedEmbeddings, encoder_kind, merge, read
from ldm.embeddings.method_files import MethodFile, read_method_file, read_words
from ldm.front_ends import setting
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import METHODS, class_of, words_of
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.util import UserError, check_value, get_obj_from_str, shown
from ldm.values import plain
from ldm.words import check_text, pattern

logger = logging.getLogger(__name__)

# How people write placeholders: "<my-cat>", or an asterisk by itself (unlike that of "2*3").
_LIKE_A_PLACEHOLDER = re.compile(r"<[^<>\s]+>|(?<![\w*])\*(?![\w*])")
# AUTOMATIC1111's way to name a LoRA or a hypernetwork in a prompt.
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):", re.IGNORECASE)


# What holds words: a file, or what was read from one.
Words = str | Path | LearnedEmbeddings | MethodFile


def load_embeddings(model: LatentDiffusion, paths: Words | Sequence[Words]) -> list[str]:
    """Replace what the model's personalization has learned by the contents of one or several files.

    A personalization that consists of vectors (see `takes_vectors`) gets the merged vectors of all files, which may be
    those of any tool. If a file is of a method (see `ldm.modules.methods`), its class replaces the personalization, and
    several files of methods or vectors are used together. Any other personalization loads one file of its own. A model
    without personalization gets an `EmbeddingManager`.

    Returns:
        the placeholders, for use in prompts.
    Raises:
        UserError: a file cannot be read or is for another text encoder, or two files have different vectors for one
            placeholder.
    """
    paths = [paths] if isinstance(paths, (str, Path, LearnedEmbeddings, MethodFile)) else list(paths)
    encoder, personalization = text_encoder_of(model), personalization_of(model)
    held = [read_method_file(path) if isinstance(path, (str, Path)) else path for path in paths]
    if any(isinstance(one, MethodFile) for one in held):
        files = [one or _vectors_of(path) for one, path in zip(held, paths, strict=True)]
        words = words_of(files, encoder, model.denoiser_shape)
        model.embedding_manager = words.to(model.alphas_cumprod.device).train(model.training)
        return list(words.placeholders)
    if personalization.method:  # whose place the vectors take
        model.embedding_manager = personalization = EmbeddingManager(encoder)
    if not takes_vectors(type(personalization)):
        kind = type(personalization).__name__
        if len(paths) != 1:
            raise UserError(f"{kind} loads one embedding file, not {len(paths)}; name one")
        if not isinstance(paths[0], (str, Path)):
            raise UserError(f"{kind} has files of its own; name the file instead of vectors")
        personalization.load(paths[0])
        return list(personalization.placeholders)
    merged = merge([_vectors_of(path) for path in paths])
    vectors = merged.vectors_for(encoder.width, encoder.family)
    personalization.take(vectors, source=f"'{merged.source}'")
    # All vectors of a file that are in use there are used here, even if the config adds vectors during training.
    personalization.on_optimizer_step(sys.maxsize)
    # A personalization that held no vectors before could not know the model's device.
    if isinstance(personalization, nn.Module):
        personalization.to(model.alphas_cumprod.device)
    return list(personalization.placeholders)


def _vectors_of(word: Words) -> LearnedEmbeddings:
    assert not isinstance(word, MethodFile), "files of methods are looked for first"
    return word if isinstance(word, LearnedEmbeddings) else read(word)


def check_encoder(config: DictConfig, words: Sequence[Words]) -> None:
    """Check that a model's text encoder can use vectors, as far as its config says; the model is not read.

    Raises:
        UserError: as `load_embeddings`.
    """
    target = OmegaConf.select(config, "model.params.cond_stage_config.target")
    width = OmegaConf.select(config, "model.params.unet_config.params.context_dim")
    family = getattr(get_obj_from_str(target), "family", None) if target else None
    if not words or family is None or not isinstance(width, int):
        return
    held = [read_words(word) if isinstance(word, (str, Path)) else word for word in words]
    vectors = [one for one in held if isinstance(one, LearnedEmbeddings)]
    for one in held:
        if isinstance(one, MethodFile):
            class_of(one)
            one.check_encoder(encoder_kind(family, width), width)
    for one in [merge(vectors)] if len(vectors) == len(held) else vectors:
        one.vectors_for(width, family)


def check_dials(config: DictConfig, words: Sequence[Words], dials: Mapping[str, float] | None) -> None:
    """Check that words have each of these dials and their values, as far as files say so; the model is not read.

    Raises:
        UserError: `dials` is no mapping of names to finite numbers, a file cannot be read, there is no such dial, or it
            cannot have this value.
    """
    dials = dial_numbers(dials)
    if not dials or of_own_class(config):
        return
    if words:
        held = [read_words(word) if isinstance(word, (str, Path)) else word for word in words]
        files = [one for one in held if isinstance(one, MethodFile)]
        known = {name for file in files for name in file.dials}
        kinds = [METHODS[file.method].__name__ for file in files if file.method in METHODS]
        for file in files:
            for name, value in dials.items():
                if name in file.dials and file.method in METHODS:
                    METHODS[file.method].check_dial(name, value, file.options)
    else:
        node = OmegaConf.select(config, "model.params.personalization_config") or {}
        kind = get_obj_from_str(node["target"]) if "target" in node else EmbeddingManager
        if kind.dials is not Personalization.dials:
            return  # only the object itself knows its dials
        known, kinds = set(), []
    for name in dials:
        if name not in known:
            raise UserError(
                f"there is no dial '{shown(name)}' of {' and '.join(dict.fromkeys(kinds)) or 'plain vectors'}; "
                + (f"known are: {', '.join(sorted(known))}" if known else "there are none, so leave it out")
            )


def dial_numbers(dials: Mapping[str, float] | None) -> dict[str, float]:
    """Return dials as Python's numbers; UserError for what is no mapping of names to finite numbers."""
    if not isinstance(dials, Mapping | None):
        raise UserError(f'dials is {shown(dials)}; give a dictionary, such as {{"truncation": 32}}')
    numbers: dict[str, float] = plain(dials or {})
    for name, value in numbers.items():
        check_value(f"the dial {shown(name)}", value, "", float)
    return numbers


def dial_text(dials: Mapping[str, float]) -> str:
    """Dials as settings of images state them and the page takes them: "truncation=32, bypass=0.1"."""
    return ", ".join(f"{name}={value:.12g}" for name, value in dials.items())


@contextmanager
def dials_at(model: LatentDiffusion, dials: Mapping[str, float] | None) -> Iterator[dict[str, str]]:
    """Set dials of the model's personalization for this block; afterwards each word has its former values.

    Yields:
        the field "Dials" of an image's settings, if there are any.
    Raises:
        UserError: there is no such dial, or its value is not possible.
    """
    numbers = dial_numbers(dials)
    if not numbers:
        yield {}
        return
    personalization = personalization_of(model)
    inner = personalization.modules() if isinstance(personalization, nn.Module) else [personalization]
    # Each of several words has values of its own; the whole comes before its parts.
    before = [(part, part.dials()) for part in inner if isinstance(part, Personalization)]
    try:
        for name, value in numbers.items():
            personalization.set_dial(name, value)
        yield {"Dials": dial_text(numbers)}
    finally:
        for part, values in before:
            for name in numbers.keys() & values.keys():
                part.set_dial(name, values[name])


def takes_vectors(personalization: type[Personalization]) -> bool:
    """Whether a class of personalizations consists of vectors by placeholder, as the files of other tools do.

    Such a class overrides `Personalization.take`.
    """
    return personalization.take is not Personalization.take


def of_own_class(config: Mapping[str, Any]) -> str | None:
    """The target of the personalization in a model's YAML, if that class alone reads its files; else None."""
    node = OmegaConf.select(config, "model.params.personalization_config") or {}  # type: ignore[arg-type]
    kind = get_obj_from_str(node["target"]) if "target" in node else None
    return None if kind is None or takes_vectors(kind) or kind.method else str(node["target"])


def check_prompts(
    model: LatentDiffusion, prompts: Iterable[str], learned: Iterable[str] | None = None
) -> None:
    """Raise UserError for a prompt with a placeholder that has no embedding.

    `learned` lists the placeholders with an embedding, by default all that the model holds.
    """
    personalization: Personalization | None = model.embedding_manager
    held = [] if personalization is None else list(personalization.placeholders)
    check_mentions(prompts, held if learned is None else learned, held)


def check_mentions(prompts: Iterable[str], learned: Iterable[str], configured: Iterable[str] = ()) -> None:
    """Raise UserError for a prompt that is no text or has a placeholder that is not in `learned`; no model is needed.

    A placeholder is a word that looks like one ("<my-cat>", a lone "*") or is in `configured`.
    """
    learned = sorted(learned, key=len, reverse=True)
    unlearned = [pattern(name) for name in configured if name not in learned]
    suspects = re.compile("|".join([*unlearned, _LIKE_A_PLACEHOLDER.pattern]), re.IGNORECASE)
    known = re.compile("|".join(map(pattern, learned)) or r"(?!)", re.IGNORECASE)
    for prompt in prompts:
        text = unicodedata.normalize("NFC", check_text(prompt, "prompt"))
        found = suspects.search(known.sub(" ", text))
        if found is not None and _NETWORK.match(found[0]):
            raise UserError(
                f"the prompt contains '{shown(found[0])}': LoRAs and hypernetworks are not supported; remove it"
            )
        if found is not None:
            raise UserError(
                f"the prompt \"{shown(prompt)}\" mentions '{shown(found[0], 30)}', but no loaded embedding has that "
                f"name (loaded: {_listed(learned) or 'none'}); load its file with {setting('words')}, or write "
                "the prompt without it"
            )


def warn_unused(triggers: Mapping[str, Sequence[str]], prompts: Sequence[str]) -> None:
    """Log a warning for each embedding file, given with its placeholders, of which no prompt uses one."""
    texts = [unicodedata.normalize("NFC", prompt) for prompt in prompts]
    for path, words in triggers.items():
        if any(_mentions(text, word) for word in words for text in texts):
            continue
        stem = Path(path).stem
        typed = stem and any(_mentions(text, stem) for text in texts)
        logger.warning(
            "'%s' is loaded, but no prompt contains %s %s: write it %s",
            shown(path, 100),
            "its word" if len(words) == 1 else "one of its words",
            _listed(words),
            f"in place of the file's name '{shown(stem)}'" if typed else "in the prompt",
        )


def _mentions(text: str, word: str) -> bool:
    return re.search(pattern(word), text, re.IGNORECASE) is not None


def _listed(words: Sequence[str], most: int = 3) -> str:
    """Some words in quotes, and how many more there are."""
    named = ", ".join(f"'{shown(word, 30)}'" for word in words[:most])
    return named + (f" and {len(words) - most} more" if len(words) > most else "")


def text_encoder_of(model: LatentDiffusion) -> TextEncoder:
    """The model's text encoder; UserError if its condition is something else than text."""
    encoder = model.cond_stage_model
    if not isinstance(encoder, TextEncoder):
        raise UserError(
            f"this model has no text encoder that takes embeddings ({type(encoder).__name__}); "
            "name a text-to-image model and its config"
        )
    return encoder


def personalization_of(model: LatentDiffusion) -> Personalization:
    """The model's personalization; a model without one gets an empty `EmbeddingManager`."""
    if model.embedding_manager is None:
        model.embedding_manager = EmbeddingManager(text_encoder_of(model))
    return model.embedding_manager
