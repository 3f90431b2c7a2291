"""The caption templates of textual inversion, and how they are filled in.

The lists are the published ones, line for line and in the same order. Repeated lines are intentional: they make a
sentence more likely in a random choice.
"""

from __future__ import annotations

import re
from itertools import chain, repeat
from pathlib import Path

from ldm.files import read_text
from ldm.util import UserError, shown

_NAME = re.compile(r"\{\}|\[name\]")
_SLOTS = re.compile(r"\{\}|\[name\]|\[image\]|\[filewords\]")

_OBJECT_LINES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)


def _in_medium(medium: str) -> list[str]:
    """The object lines with "a photo of" at the beginning of a line replaced; the other lines are unchanged."""
    photo = "a photo of "
    return [f"{medium} of {s.removeprefix(photo)}" if s.startswith(photo) else s for s in _OBJECT_LINES]


OBJECT_TEMPLATES: tuple[str, ...] = (
    *_OBJECT_LINES,
    *_in_medium("an illustration"),
    *_in_medium("a depiction"),
)

OBJECT_DUAL_TEMPLATES: tuple[str, ...] = tuple(f"{line} with {{}}" for line in _OBJECT_LINES)

STYLE_TEMPLATES: tuple[str, ...] = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

STYLE_DUAL_TEMPLATES: tuple[str, ...] = (
    "a painting in the style of {} with {}",
    "a rendering in the style of {} with {}",
    "a cropped painting in the style of {} with {}",
    "the painting in the style of {} with {}",
    "a clean painting in the style of {} with {}",
    "a dirty painting in the style of {} with {}",
    "a dark painting in the style of {} with {}",
    "a cool painting in the style of {} with {}",
    "a close-up painting in the style of {} with {}",
    "a bright painting in the style of {} with {}",
    "a cropped painting in the style of {} with {}",
    "a good painting in the style of {} with {}",
    "a painting of one {} in the style of {}",
    "a nice painting in the style of {} with {}",
    "a small painting in the style of {} with {}",
    "a weird painting in the style of {} with {}",
    "a large painting in the style of {} with {}",
)

# One word per training image: each is a single token in the vocabularies of CLIP and of BERT.
PER_IMAGE_TOKENS: tuple[str, ...] = tuple("אבגדהוזחטיכלמנסעפצקרשת")


def is_dual(template: str) -> bool:
    """Whether a template has a slot for the word of a single image."""
    return template.count("{}") > 1 or "[image]" in template


def fill(template: str, placeholder: str, *, per_image: str | None = None, filewords: str = "") -> str:
    """Fill in a template: the first `{}` is replaced by the placeholder, a second one by `per_image`.

    Slots may also be named: `[name]` is the placeholder, `[image]` the word `per_image` of a single image, and
    `[filewords]` the description of the image, in which `[name]` and `{}` are the placeholder too. If the description
    is empty, commas and spaces at both ends of the caption are removed. Other braces and brackets are kept.

    Raises:
        UserError: the template is dual and there is no `per_image`.
    """
    if per_image is None:
        if is_dual(template):
            raise UserError(
                f"template '{shown(template, 100)}' has a second slot: write [name], or set per_image_tokens"
            )
        per_image = ""
    slots = chain((placeholder,), repeat(per_image))
    described = _NAME.sub(lambda _: placeholder, filewords)
    words = {"[name]": placeholder, "[image]": per_image, "[filewords]": described}
    # A single pass, so that a placeholder may contain braces itself.
    caption = _SLOTS.sub(lambda slot: next(slots) if slot[0] == "{}" else words[slot[0]], template)
    return caption.strip(" ,") if "[filewords]" in template and not described else caption


def load_templates(path: str | Path) -> list[str]:
    """Read the lines of a template file that are not empty.

    Raises UserError if the file is missing, not a text file, or empty.
    """
    templates = [line.strip() for line in read_text(path, "template file").splitlines() if line.strip()]
    if not templates:
        raise UserError(
            f"template file {path} is empty; write one caption per line, with {{}} for the placeholder"
        )
    return templates
