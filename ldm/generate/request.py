"""What images are asked for, checked without a model: prompts, learned words, dials, steps and size.

Nothing here needs torch, so that a mistake is answered at once.
"""

from __future__ import annotations

import inspect
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import DictConfig, OmegaConf

from ldm import words as prompt_words
from ldm.base_models import check_size_conditions, check_steps, size_multiple
from ldm.embeddings import LearnedEmbeddings, encoder_kind, merge
from ldm.embeddings.method_files import (
    CLASSES,
    MethodFile,
    check_dial,
    check_distinct,
    check_method,
    read_words,
    triggers_of,
    words_to_begin,
)
from ldm.embeddings.reader import chosen, read_to_begin
from ldm.front_ends import setting
from ldm.generate.prompt_syntax import parse
from ldm.util import UserError, check_value, get_obj_from_str, shown, stand_in
from ldm.values import plain
from ldm.words import check_text, pattern

logger = logging.getLogger(__name__)

# How people write placeholders: "<my-cat>", or an asterisk by itself (unlike that of "2*3").
_LIKE_A_PLACEHOLDER = re.compile(r"<[^<>\s]+>|(?<![\w*])\*(?![\w*])")
# AUTOMATIC1111's way to name a LoRA or a hypernetwork in a prompt.
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):", re.IGNORECASE)
# Suffixes of the files that embedding:NAME in a prompt may mean; the empty one where NAME has a suffix.
EMBEDDING_SUFFIXES = ("", ".safetensors", ".pt", ".bin", ".png", ".webp")

# What holds words: a file, or what was read from one.
Words = str | Path | LearnedEmbeddings | MethodFile
# The class word of each placeholder, or one for all.
ClassWords: TypeAlias = Mapping[str, str] | str


@dataclass(frozen=True)
class Prompts:
    """Prompts in which every word is known, with the files (or vectors) that hold the words."""

    prompts: list[str]
    negative_prompt: str
    words: list[Words]


def resolve(
    config: DictConfig,
    prompts: Sequence[str],
    negative_prompt: str,
    words: Sequence[Words],
    *,
    default: str = "a photo",
    syntax: str = "a1111",
    folder: str | Path = "embeddings",
    dials: Mapping[str, float] | None = None,
) -> Prompts:
    """Find the files of `embedding:NAME`, and check that every word of the prompts is held; no model is needed.

    Without prompts, the prompt is "a photo of WORD" with the first word, or `default` if there is none. `folder` is
    where `embedding:NAME` looks beside the current folder. A file whose word is in no prompt is a warning. `dials` are
    those that will be set.

    Raises:
        UserError: a file cannot be read, or is for another text encoder, or a prompt has a placeholder that no file
            holds, or no file has such a dial.
    """
    node = OmegaConf.select(config, "model.params.personalization_config") or {}
    params = node.get("params") or {}
    configured = [str(word) for word in params.get("placeholder_strings") or []]
    learned = configured if params.get("embedding_manager_ckpt") else []
    given, words = [*prompts], list(words)
    if of_own_class(config):  # which alone knows its files and its placeholders
        return Prompts(given or [default], negative_prompt, words)
    if path := params.get("embedding_manager_ckpt"):
        check_start(config, path, configured, of_yaml=True)
    if syntax != "plain":
        *given, negative_prompt = [
            _find_embeddings(prompt, folder, words) for prompt in [*given, negative_prompt]
        ]
    held = [_read(word) for word in words]
    triggers = {_name(word): one.triggers for word, one in zip(words, held, strict=True)}
    if words:
        learned = [trigger for several in triggers.values() for trigger in several]
    given = given or [f"a photo of {learned[0]}" if learned else default]
    check_mentions([*given, negative_prompt], learned, configured)
    warn_unused(triggers, [*given, negative_prompt])
    for prompt in [*given, negative_prompt]:
        parse(prompt, {*learned, *configured}, syntax)
    check_encoder(config, held)
    check_dials(config, held, dials)
    return Prompts(given, negative_prompt, words)


def _find_embeddings(prompt: str, folder: str | Path, words: list[Words]) -> str:
    """Replace each embedding:NAME of a prompt by the placeholder of that file, which is added to `words`.

    Raises:
        UserError: there is no such file, or it holds several placeholders, or NAME is missing.
    """
    if re.search(r"\bembedding:(?=\s|$)", prompt, re.IGNORECASE):
        raise UserError(
            "the prompt contains 'embedding:' without a name; write embedding:NAME without a space"
        )

    def placeholder(match: re.Match[str]) -> str:
        name = match[1]
        places = [Path(base) / f"{name}{suffix}" for base in (".", folder) for suffix in EMBEDDING_SUFFIXES]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(
                f"the prompt names 'embedding:{name}', but there is no such file here or in '{folder}'; "
                f"name {setting('word_file')}"
            )
        triggers = triggers_of(found)
        if len(triggers) > 1:
            raise UserError(
                f"'{found}' holds {len(triggers)} words; name it with {setting('words')} and write the words"
            )
        if str(found) not in words:
            words.append(str(found))
        return triggers[0]

    # A name ends where ComfyUI's does, or at the end of a sentence; it may hold the letters of any language.
    named = r"""\bembedding:([^\s,:;|"'()\[\]{}<>]*[^\s,:;|"'()\[\]{}<>.!?])"""
    return re.sub(named, placeholder, prompt, flags=re.IGNORECASE)


def _name(word: Words) -> str:
    return str(word) if isinstance(word, (str, Path)) else word.source or word.triggers[0]


def _read(word: Words) -> LearnedEmbeddings | MethodFile:
    """What a file holds, without the numbers, or what was read from one."""
    return read_words(word, numbers=False) if isinstance(word, (str, Path)) else word


# -- words -----------------------------------------------------------------------------------------------------


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


def class_words(
    held: Iterable[str | Path | LearnedEmbeddings | MethodFile],
    prompts: Iterable[str],
    given: Sequence[str] = (),
) -> ClassWords:
    """Return the class words of placeholders, from what is given and else the initializers that the files state.

    Args:
        held: the embedding files, or what was read from them.
        prompts: that the images are generated from; only placeholders in them need a class word.
        given: WORD for all placeholders, or PLACEHOLDER=WORD for one.
    Raises:
        UserError: a file cannot be read, a placeholder is unknown, or the class word of one is not known.
    """
    if len(given) == 1 and "=" not in given[0]:
        return given[0].strip()
    found: dict[str, str | None] = {}
    for one in held:
        learned = _read(one)
        found.update({trigger: learned.initializers.get(trigger) for trigger in learned.triggers})
    for text in given:
        name, mark, word = text.rpartition("=")
        if mark and name not in found:
            raise UserError(
                f"the class word '{shown(text)}' names no loaded word; loaded: {', '.join(map(shown, found)) or 'none'}"
            )
        found.update({name: word.strip()} if mark else dict.fromkeys(found, word.strip()))
    pieces = [piece for prompt in prompts for piece in prompt_words.split(prompt, found)]
    unknown = next((name for _, name in pieces if name is not None and not found[name]), None)
    if unknown is not None:
        raise UserError(
            f"the class word of '{shown(unknown)}' is not in its file; name it, as in "
            f"{setting('class_word', shown(unknown))}"
        )
    return {trigger: word for trigger, word in found.items() if word}


# -- the model, by its YAML --------------------------------------------------------------------------------------


def check_encoder(config: DictConfig, words: Sequence[Words]) -> None:
    """Check that a model's text encoder can use vectors, as far as its config says; the model is not read.

    Raises:
        UserError: as `load_embeddings`.
    """
    target = OmegaConf.select(config, "model.params.cond_stage_config.target")
    width = OmegaConf.select(config, "model.params.unet_config.params.context_dim")
    family = getattr(_class_at(target), "family", None) if target else None
    if not words or family is None or not isinstance(width, int) or of_own_class(config):
        return
    held = [_read(word) for word in words]
    vectors = [one for one in held if isinstance(one, LearnedEmbeddings)]
    for one in held:
        if isinstance(one, MethodFile):
            check_method(one)
            one.check_encoder(encoder_kind(family, width), width)
    if len(vectors) < len(held):
        check_distinct([word for one in held for word in one.triggers])
    for one in [merge(vectors)] if len(vectors) == len(held) else vectors:
        one.vectors_for(width, family)


def check_start(config: DictConfig, path: str | Path, words: Sequence[str], of_yaml: bool) -> None:
    """Check that training can begin from a file of vectors or of a method, as far as that needs no numbers.

    What a class of one's own checks is not checked here.

    Args:
        words: the placeholders; without any, the file's own may count, and nothing is checked.
        of_yaml: whether the model has the sizes of the YAML.
    Raises:
        UserError: the file cannot be read, holds other words, or is for another text encoder or method.
    """
    if not words:
        return
    kind = _class_at(str(config["model"]["params"]["personalization_config"]["target"]))
    owner = next((one.__name__ for one in getattr(kind, "__mro__", ()) if "check_file" in vars(one)), "")
    held: LearnedEmbeddings | MethodFile
    if owner == "EmbeddingManager":
        held = chosen(read_to_begin(path, numbers=False), words, str(path))
    elif owner == "LearnedWords" and kind.method in CLASSES:
        held = words_to_begin(path, kind.method, kind.__name__, words, numbers=False)
    else:
        return
    if of_yaml:
        check_encoder(config, [held])


def read_all(config: DictConfig, words: Words | Sequence[Words]) -> list[Words]:
    """Read files with their numbers, and check them as `check_encoder`; those of a class of one's own stay files."""
    words = [words] if isinstance(words, (str, Path, LearnedEmbeddings, MethodFile)) else words
    if of_own_class(config):
        return list(words)
    held: list[Words] = [read_words(word) if isinstance(word, (str, Path)) else word for word in words]
    check_encoder(config, held)
    return held


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
        files = [one for one in map(_read, words) if isinstance(one, MethodFile)]
        known = {name for file in files for name in file.dials}
        kinds = [CLASSES[file.method] for file in files if file.method in CLASSES]
        for file in files:
            for name, value in dials.items():
                if name in file.dials and file.method in CLASSES:
                    check_dial(name, value, file.options)
    else:
        node = OmegaConf.select(config, "model.params.personalization_config") or {}
        if "target" in node and _overrides(_class_at(node["target"]), "dials"):
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


def takes_vectors(personalization: type) -> bool:
    """Whether a class of personalizations consists of vectors by placeholder, as the files of other tools do.

    Such a class overrides `Personalization.take`.
    """
    return _overrides(personalization, "take")


def _overrides(personalization: type, name: str) -> bool:
    """Whether a class, or its stand-in, replaces a method of `ldm.modules.personalization.Personalization`."""
    owner = next((kind for kind in personalization.__mro__ if name in vars(kind)), None)
    return owner is not None and not _is_base(owner)


def _is_base(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("ldm.modules.personalization", "Personalization")


def _class_at(target: str) -> Any:
    """The class at a dotted path, read from its source where that says enough, and imported where not."""
    return stand_in(target) or get_obj_from_str(target)


def of_own_class(config: Mapping[str, Any]) -> str | None:
    """The target of the personalization in a model's YAML, if that class alone reads its files; else None.

    A function that makes one, or a class that is none, of which the model says so, counts as such a class.
    """
    node = OmegaConf.select(config, "model.params.personalization_config") or {}  # type: ignore[arg-type]
    kind = _class_at(node["target"]) if "target" in node else None
    if kind is None:
        return None
    ours = inspect.isclass(kind) and any(map(_is_base, kind.__mro__))
    return None if ours and (takes_vectors(kind) or kind.method) else str(node["target"])


def check_fits(config: Mapping[str, Any], steps: int, height: int | None, width: int | None) -> None:
    """Raise UserError for steps or a size that the model of a YAML cannot have, before the model is read.

    What a model of other classes can have is found when it generates.
    """
    check_steps(steps, (config["model"].get("params") or {}).get("timesteps") or 1000)
    if multiple := size_multiple(config):
        check_multiple(multiple, height, width)


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError for size conditions that are out of range, or that the model of a YAML does not have."""
    if sizes:
        kind = _class_at(str(config["model"]["target"]))
        check_size_conditions(sizes, getattr(kind, "size_conditions", False))


def check_multiple(multiple: int, height: int | None, width: int | None) -> None:
    """Raise UserError for a height or width in pixels that is no multiple of what a model needs."""
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < 1 or value % multiple):
            nearest = max(round(value / multiple), 1) * multiple
            raise UserError(
                f"{name} {value} is not a multiple of {multiple}, which this model needs; try {nearest}"
            )
