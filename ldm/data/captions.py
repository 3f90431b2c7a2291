"""The captions of a personalization set: templates with the placeholder in them, or the words beside a picture."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm import prompts
from ldm.util import UserError

logger = logging.getLogger(__name__)


class ConceptImage(NamedTuple):
    """A file, the placeholder of its concept, and the placeholder as captions say it ("cat *")."""

    path: Path
    placeholder: str
    spoken: str


class Captions:
    """What can be said of each picture.

    A picture's caption is a template filled with its words, or, where `use_captions` asks for it, the `.txt` beside
    it and nothing else. Mistakes in the template file or in a `.txt` are UserErrors.
    """

    def __init__(
        self,
        pictures: Sequence[ConceptImage],
        templates: Sequence[str],
        dual_templates: Sequence[str],
        template_file: str | os.PathLike[str] | None = None,
        per_image_tokens: bool = False,
        use_captions: bool = False,
    ) -> None:
        if per_image_tokens and len(pictures) > len(prompts.PER_IMAGE_TOKENS):
            limit = len(prompts.PER_IMAGE_TOKENS)
            raise UserError(f"per_image_tokens has words for {limit} images, but there are {len(pictures)}")
        self.templates, self.dual_templates = list(templates), list(dual_templates)
        if template_file is not None:
            self.templates, self.dual_templates = _from_file(template_file, per_image_tokens)
        self.per_image_tokens = per_image_tokens
        self._pictures = list(pictures)
        self._file_words = [_file_words(picture.path) for picture in pictures]
        self._own: list[str | None] = [None] * len(pictures)
        if use_captions:
            self._own = [self._beside(i) for i in range(len(pictures))]
            if None in self._own:
                logger.info("%d of %d images have no .txt beside them", self._own.count(None), len(self._own))

    def of(self, picture: int, template: str) -> str:
        """The caption of a picture under a template."""
        own = self._own[picture]
        return self._filled(picture, template) if own is None else own

    def all(self) -> list[str]:
        """Every caption that can be drawn, once."""
        lines = [*self.templates, *(self.dual_templates if self.per_image_tokens else ())]
        return list(dict.fromkeys(self.of(i, line) for i in range(len(self._own)) for line in lines))

    def without(self, placeholders: Iterable[str]) -> list[str]:
        """The captions that hold none of the placeholders."""
        words = list(placeholders)
        return [caption for caption in self.all() if not any(word in caption for word in words)]

    def check(self, placeholders: Iterable[str]) -> None:
        """Raises UserError when a placeholder is in no caption; captions without any get one log line."""
        words, captions = list(placeholders), self.all()
        for word in words:
            if not any(word in caption for caption in captions):
                raise UserError(
                    f"the placeholder {word!r} is in none of the captions (one is {captions[0]!r}):"
                    " check placeholder_token, or write {} or [name] in the templates"
                )
        missing = self.without(words)
        if missing:
            logger.warning(
                "%d of %d captions lack the placeholder: %r", len(missing), len(captions), missing[0]
            )

    def _filled(self, picture: int, template: str) -> str:
        word = prompts.PER_IMAGE_TOKENS[picture] if self.per_image_tokens else None
        words = self._file_words[picture]
        return prompts.fill(template, self._pictures[picture].spoken, per_image=word, filewords=words)

    def _beside(self, picture: int) -> str | None:
        path, placeholder, spoken = self._pictures[picture]
        words = _sidecar(path)
        if words is None:
            return None
        if "[name]" in words or "{}" in words:
            return self._filled(picture, words)
        return words if placeholder in words else f"{spoken}, {words}"


def _from_file(path: str | os.PathLike[str], per_image_tokens: bool) -> tuple[list[str], list[str]]:
    """The templates and the dual templates of a file; without dual ones these are made from the others."""
    lines = prompts.load_templates(path)
    single = [line for line in lines if not prompts.is_dual(line)]
    dual = [line for line in lines if prompts.is_dual(line)]
    if dual and not per_image_tokens:
        raise UserError(f"template file {path}: {dual[0]!r} has a second slot, which needs per_image_tokens")
    if not single:
        raise UserError(f"template file {path}: lines with a second slot only; give some with one as well")
    return single, dual or [f"{line} with [image]" for line in single]


def _sidecar(image: Path) -> str | None:
    """The words of the `.txt` beside an image, on one line; None where there is none or nothing in it."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()) or None
    except UnicodeDecodeError:
        raise UserError(f"caption file {path} is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"cannot read caption file {path}: {error.strerror}") from None


def _file_words(image: Path) -> str:
    """What `[filewords]` stands for: the `.txt` beside the image, else its name without a number in front."""
    return _sidecar(image) or re.sub(r"^[-\d]+\s*", "", image.stem)
