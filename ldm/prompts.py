"""The caption templates of textual inversion, as data, and how they are filled.

The lists are the published ones, line for line and in their order; the repeats are meant, they are the
weights with which a random choice meets a sentence.
"""

from __future__ import annotations

import re
from itertools import chain, repeat
from pathlib import Path

from ldm.util import UserError

_MARKS = re.compile(r"\{\}|\[name\]|\[image\]|\[filewords\]")

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


def _told_as(medium: str) -> list[str]:
    """The object lines with another medium in those that open with "a photo of"; the others stay."""
    opening = "a photo of "
    return [f"{medium} of {s.removeprefix(opening)}" if s.startswith(opening) else s for s in _OBJECT_LINES]


OBJECT_TEMPLATES: tuple[str, ...] = (*_OBJECT_LINES, *_told_as("an illustration"), *_told_as("a depiction"))

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

# One word per training image: single tokens both in CLIP's and in BERT's vocabulary.
PER_IMAGE_TOKENS: tuple[str, ...] = tuple("אבגדהוזחטיכלמנסעפצקרשת")


def is_dual(template: str) -> bool:
    """Whether a template has a place for the image's own word."""
    return template.count("{}") > 1 or "[image]" in template


def fill(template: str, placeholder: str, *, per_image: str | None = None, filewords: str = "") -> str:
    """A caption: the first `{}` becomes the placeholder, a second one the image's own word.

    By name: `[name]` is the placeholder, `[image]` the image's own word, `[filewords]` the image's description;
    without a description the comma at the caption's end goes too. Other braces and brackets are left alone.
    Raises UserError where a dual template meets no `per_image`.
    """
    if per_image is None:
        if is_dual(template):
            raise UserError(f"template {template!r} has a second slot: write [name], or set per_image_tokens")
        per_image = ""
    slots = chain((placeholder,), repeat(per_image))
    words = {"[name]": placeholder, "[image]": per_image, "[filewords]": filewords}
    # One pass, so that a placeholder or a description may itself hold braces.
    caption = _MARKS.sub(lambda mark: next(slots) if mark[0] == "{}" else words[mark[0]], template)
    return caption.strip(" ,") if "[filewords]" in template and not filewords else caption


def load_templates(path: str | Path) -> list[str]:
    """The lines of a template file (UTF-8), empty ones left out.

    Raises UserError, which names the file, when it is missing, not a text file, or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"template file not found: {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"template file {path} is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"cannot read template file {path}: {error.strerror}") from None
    templates = [line.strip() for line in text.splitlines() if line.strip()]
    if not templates:
        raise UserError(f"template file {path} is empty: write a caption per line, {{}} for the placeholder")
    return templates
