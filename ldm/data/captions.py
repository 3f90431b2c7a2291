"""The captions of a concept's images: templates with the placeholder, or text files beside the images."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm import prompts
from ldm.util import UserError

logger = logging.getLogger(__name__)


class ConceptImage(NamedTuple):
    """An image file, the placeholder of its concept, and the words that captions use for it ("cat *")."""

    path: Path
    placeholder: str
    phrase: str


class Captions:
    """All possible captions of each image.

    The captions of an image are the templates, filled in for it. With `use_captions`, an image with a `.txt` beside
    it has the text of that file as its only caption.

    Raises UserError if the template file or a `.txt` is not valid.
    """

    def __init__(
        self,
        images: Sequence[ConceptImage],
        templates: Sequence[str],
        dual_templates: Sequence[str],
        template_file: str | os.PathLike[str] | None = None,
        per_image_tokens: bool = False,
        use_captions: bool = False,
    ) -> None:
        if per_image_tokens and len(images) > len(prompts.PER_IMAGE_TOKENS):
            limit = len(prompts.PER_IMAGE_TOKENS)
            raise UserError(f"per_image_tokens has words for {limit} images, but there are {len(images)}")
        self.templates, self.dual_templates = list(templates), list(dual_templates)
        if template_file is not None:
            self.templates, self.dual_templates = _read_templates(Path(template_file), per_image_tokens)
        self.per_image_tokens = per_image_tokens
        self._images = list(images)
        self._file_words = [_file_words(image.path) for image in images]
        self._from_txt: list[str | None] = [None] * len(images)
        if use_captions:
            self._from_txt = [self._txt_caption(i) for i in range(len(images))]
            if None in self._from_txt:
                missing = self._from_txt.count(None)
                logger.info("%d of %d images have no .txt beside them", missing, len(images))

    def of(self, image: int, template: str) -> str:
        """Return the caption of an image for a template."""
        text = self._from_txt[image]
        return self._fill(image, template) if text is None else text

    def all(self) -> list[str]:
        """Return every possible caption once."""
        lines = [*self.templates, *(self.dual_templates if self.per_image_tokens else ())]
        return list(dict.fromkeys(self.of(i, line) for i in range(len(self._images)) for line in lines))

    def _fill(self, image: int, template: str) -> str:
        token = prompts.PER_IMAGE_TOKENS[image] if self.per_image_tokens else None
        words = self._file_words[image]
        return prompts.fill(template, self._images[image].phrase, per_image=token, filewords=words)

    def _txt_caption(self, image: int) -> str | None:
        """The caption from the `.txt` of an image; None if there is none."""
        path, placeholder, phrase = self._images[image]
        text = _read_txt(path)
        if text is None:
            return None
        if "[name]" in text or "{}" in text:
            return self._fill(image, text)
        return text if placeholder in text else f"{phrase}, {text}"


def _read_templates(path: Path, per_image_tokens: bool) -> tuple[list[str], list[str]]:
    """Read templates and dual templates; if the file has no dual ones, they are made from the others."""
    lines = prompts.load_templates(path)
    single = [line for line in lines if not prompts.is_dual(line)]
    dual = [line for line in lines if prompts.is_dual(line)]
    if dual and not per_image_tokens:
        raise UserError(f"template file {path}: {dual[0]!r} has a second slot, which needs per_image_tokens")
    if not single:
        raise UserError(f"template file {path}: every line has a second slot; add lines with one slot")
    return single, dual or [f"{line} with [image]" for line in single]


def _read_txt(image: Path) -> str | None:
    """Read the `.txt` beside an image as one line; None if it is missing or empty."""
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
    """Return the text for `[filewords]`: the `.txt` beside the image, or its name without a leading number."""
    return _read_txt(image) or re.sub(r"^[-\d]+\s*", "", image.stem)
