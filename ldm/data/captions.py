"""The captions of a concept's images: templates, or texts beside the images; and what is checked of both at once."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm import prompts, words
from ldm.files import read_text
from ldm.front_ends import setting
from ldm.images import CAPTION_SUFFIXES, check_image_folder, check_masks, count_masked, no_masks
from ldm.util import Problem, UserError, brief, shown

logger = logging.getLogger(__name__)

_EITHER = " or ".join(CAPTION_SUFFIXES)


class ConceptImage(NamedTuple):
    """An image file, the placeholder of its concept, and the words that captions use for it ("cat *")."""

    path: Path
    placeholder: str
    phrase: str


# The keys of a dataset's samples; with masks there is a "loss_weight" too.
SAMPLE_KEYS = ("image", "caption", "sizes")


class Captions:
    """All possible captions of each image.

    The captions of an image are the templates, filled in for it. With `use_captions`, an image with a caption file
    beside it has the text of that file as its only caption.

    Raises UserError if the template file or a caption file is not valid, or `use_captions` finds no caption at all.
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
        _check_count(len(images), per_image_tokens)
        self.templates, self.dual_templates = list(templates), list(dual_templates)
        if template_file is not None:
            self.templates, self.dual_templates = _read_templates(Path(template_file), per_image_tokens)
        self.per_image_tokens = per_image_tokens
        self._images = list(images)
        beside = CaptionFiles(image.path for image in images)
        texts = [beside.text(image.path) for image in images]
        self._file_words = [
            text or _words_of_name(image.path) for text, image in zip(texts, images, strict=True)
        ]
        self._from_file: list[str | None] = [None] * len(images)
        uses_words = any("[filewords]" in line for line in (*self.templates, *self.dual_templates))
        if use_captions or uses_words:
            _check_texts({image.path: text for image, text in zip(images, texts, strict=True)})
        if use_captions:
            for file in beside.unusable:
                logger.warning("%s", brief(f"{file} {_kind_of(file)}: it is not read as a caption"))
            self._from_file = [self._own_caption(i, text) for i, text in enumerate(texts)]
            if not any(texts):
                raise UserError(_no_captions(images[0].path))
            if missing := texts.count(None):
                logger.info(
                    "%d of %d images have no %s beside them and use the templates",
                    missing,
                    len(images),
                    _EITHER,
                )
        if uses_words and (empty := self._file_words.count("")):
            logger.info(
                "[filewords] is empty for %d of %d images: no %s beside them, and no words in their names",
                empty,
                len(images),
                _EITHER,
            )

    def of(self, image: int, template: str) -> str:
        """Return the caption of an image for a template."""
        text = self._from_file[image]
        return self._fill(image, template) if text is None else text

    def all(self) -> list[str]:
        """Return every possible caption once."""
        lines = [*self.templates, *(self.dual_templates if self.per_image_tokens else ())]
        return list(dict.fromkeys(self.of(i, line) for i in range(len(self._images)) for line in lines))

    def _fill(self, image: int, template: str) -> str:
        token = prompts.PER_IMAGE_TOKENS[image] if self.per_image_tokens else None
        filewords = self._file_words[image]
        return prompts.fill(template, self._images[image].phrase, per_image=token, filewords=filewords)

    def _own_caption(self, image: int, text: str | None) -> str | None:
        """The caption from the text beside an image, with the placeholder in it; None if there is no text."""
        if text is None:
            return None
        if "[name]" in text or "{}" in text:
            return self._fill(image, text.replace("{}", "[name]"))
        _, placeholder, phrase = self._images[image]
        composed = unicodedata.normalize("NFC", text)
        named = re.search(words.pattern(placeholder), composed, re.IGNORECASE)
        return text if named else f"{phrase}, {text}"


def absent_key(name: str, key: str, held: Iterable[str]) -> Problem:
    """The problem that samples do not hold the key by which a model reads them."""
    path, keys = f"model.params.{name}", ", ".join(map(str, held))
    rest = f", but the samples of data.params.train hold {keys}; name one of these"
    return Problem(path, f"{path} is '{key}'", rest)


def phrase(placeholder: str, coarse: str | Mapping[str, str] | None, placeholders: Sequence[str]) -> str:
    """Return the words that captions use for a placeholder: with its class in front, if it has one.

    Raises UserError if pairs `placeholder: class` name a word that is none of `placeholders`.
    """
    if isinstance(coarse, Mapping):
        coarse = {words.check_word(word): text for word, text in coarse.items()}
        unknown = [word for word in coarse if word not in placeholders]
        if unknown:
            own = ", ".join(f"'{shown(word, 30)}'" for word in placeholders[:6])
            raise UserError(
                f"coarse_class_text names '{shown(unknown[0], 30)}', which is none of the placeholders {own}; write "
                "{placeholder: class} with one of these, or the class alone"
            )
        coarse = coarse.get(placeholder)
    return f"{coarse} {placeholder}" if coarse else placeholder


def no_placeholder(learned: Sequence[str], caption: str) -> UserError:
    """The error for captions without any of the words that are learned; one of them is `caption`."""
    named = ", ".join(f"'{word}'" for word in learned[:3])
    return UserError(
        f"none of the captions contains the placeholder {named} (one caption is '{caption}'); set placeholder_token of "
        f"the dataset, or {setting('placeholder')}, to the same word"
    )


def check_dataset(params: Mapping[str, Any], roots: Any, checked: bool, learned: Sequence[str]) -> None:
    """Raise UserError for what is wrong with the first images of a dataset, and with what its params ask for.

    Args:
        params: of the dataset; `checked` says that they are all of them, and known to fit.
        roots: its `data_root`.
        learned: the words that the run learns, if they are known.
    """
    zoom = max((checked and params.get("zooms")) or [1])
    folders = roots if isinstance(roots, Mapping) else {params.get("placeholder_token") or "*": roots}
    images = {
        words.check_word(word) if checked else str(word): check_image_folder(folder, zoom)
        for word, folder in folders.items()
    }
    names = ("template_file", "per_image_tokens", "use_captions", *(["coarse_class_text"] if checked else []))
    check_captions(images, learned, **{name: params[name] for name in names if params.get(name)})
    if params.get("mask_weight") is not None:
        every = [path for paths in images.values() for path in paths]
        if not count_masked(every):
            raise no_masks(params["mask_weight"], every[0])
        crop = {name: params[name] for name in ("crops", "zooms", "center_crop") if name in params}
        check_masks(every, **(crop if checked else {"center_crop": False}))


def check_captions(
    images: Mapping[str, Sequence[Path]],
    learned: Sequence[str] = (),
    coarse_class_text: str | Mapping[str, str] | None = None,
    template_file: str | os.PathLike[str] | None = None,
    per_image_tokens: bool = False,
    use_captions: bool = False,
) -> None:
    """Raise UserError for a template file or captions that a dataset or a run would refuse, before either is made.

    `images` are the files of each placeholder, and `learned` the words that the run learns, if that is known.
    """
    every = [path for paths in images.values() for path in paths]
    _check_count(len(every), per_image_tokens)
    phrases = [phrase(word, coarse_class_text, [*images]) for word in images]
    lines = () if template_file is None else sum(_read_templates(Path(template_file), per_image_tokens), [])
    if use_captions or any("[filewords]" in line for line in lines):
        # All of them are read, so that one that cannot be is found now.
        beside = CaptionFiles(every)
        texts = {image: beside.text(image) for image in every}
        _check_texts(texts)
        if use_captions and not any(texts.values()):
            raise UserError(_no_captions(every[0]))
        return
    filled = [
        prompts.fill(line, one, per_image=prompts.PER_IMAGE_TOKENS[0])
        for line in lines or prompts.OBJECT_TEMPLATES[:1]
        for one in phrases
    ]
    pieces = (piece for text in filled for piece in words.split(text, learned, ignores_case=True))
    if learned and not any(word for _, word in pieces):
        raise no_placeholder(learned, filled[0])


def _check_count(images: int, per_image_tokens: bool) -> None:
    if per_image_tokens and images > (limit := len(prompts.PER_IMAGE_TOKENS)):
        raise UserError(
            f"per_image_tokens has words for {limit} images, but there are {images}; remove it, or some of the images"
        )


def _check_texts(texts: Mapping[Path, str | None]) -> None:
    for path, text in texts.items():
        if "[filewords]" in (text or ""):
            raise UserError(f"the caption of {path} holds [filewords], which is itself; remove that word")


class CaptionFiles:
    """The caption files beside images: those with the image's name and one of `CAPTION_SUFFIXES`, in any case.

    Of several files beside one image, that with the first suffix is used; an empty one does not count.
    """

    def __init__(self, images: Iterable[Path]) -> None:
        images = list(images)
        self._files: dict[Path, dict[str, Path]] = {}
        for folder in dict.fromkeys(image.parent for image in images):
            for file in sorted(folder.iterdir()):  # ".txt" comes after ".TXT" and replaces it
                if file.suffix.lower() in CAPTION_SUFFIXES:
                    self._files.setdefault(file.with_suffix(""), {})[file.suffix.lower()] = file
        beside = [file for image in images for file in self._files.get(image.with_suffix(""), {}).values()]
        # Folders, pipes and links that lead nowhere, named like the caption of an image.
        self.unusable = [file for file in dict.fromkeys(beside) if not file.is_file()]

    def text(self, image: Path) -> str | None:
        """Return the caption of an image as one line; None if there is none or it is empty."""
        named = self._files.get(image.with_suffix(""), {})
        found = {suffix: file for suffix, file in named.items() if file not in self.unusable}
        texts = {suffix: _line(found[suffix]) for suffix in CAPTION_SUFFIXES if suffix in found}
        used = next((suffix for suffix, text in texts.items() if text), None)
        if used is None:
            return None
        if len(set(filter(None, texts.values()))) > 1:
            logger.info("%s", brief(f"{image} has two captions: {found[used].name} is used"))
        return texts[used]


def _kind_of(path: Path) -> str:
    """Why a path with the name of a caption file has no caption."""
    if path.is_file():
        return "is empty or of no image"
    if path.is_dir():
        return "is a folder"
    return "is not an ordinary file" if path.exists() else "is a link that leads nowhere"


def _line(path: Path) -> str | None:
    return " ".join(read_text(path, "caption file").split()) or None


def _no_captions(first: Path) -> str:
    """The error for captions that were asked for where there are none, with the text that was perhaps meant."""
    own = " or ".join(f"'{first.stem}{suffix}'" for suffix in CAPTION_SUFFIXES)
    others = [
        file
        for place in ("*", "*/*")
        for file in sorted(first.parent.glob(place))
        if file.suffix.lower() in CAPTION_SUFFIXES
    ]
    what = "no image has a caption beside it"
    if others:
        named = shown(others[0].relative_to(first.parent).as_posix())
        what += f" with a text ('{named}' {_kind_of(others[0])})"
    return f"use_captions: {what}; write {own} in {shown(str(first.parent), 100)}, or remove use_captions"


def _read_templates(path: Path, per_image_tokens: bool) -> tuple[list[str], list[str]]:
    """Read templates and dual templates; if the file has no dual ones, they are made from the others."""
    lines = prompts.load_templates(path)
    single = [line for line in lines if not prompts.is_dual(line)]
    dual = [line for line in lines if prompts.is_dual(line)]
    if dual and not per_image_tokens:
        raise UserError(
            f"template file {path}: '{shown(dual[0])}' has a second slot, which needs per_image_tokens"
        )
    if not single:
        raise UserError(f"template file {path}: every line has a second slot; add lines with one slot")
    return single, dual or [f"{line} with [image]" for line in single]


def _words_of_name(image: Path) -> str:
    """Return the words for `[filewords]` from the name of an image, without a leading number."""
    name = os.fsencode(image.stem).decode(errors="replace")  # a name may be in another encoding
    return re.sub(r"^[-\d]+\s*", "", name)
