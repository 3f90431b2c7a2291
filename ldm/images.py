"""Reads pictures as people see them, turns them into tensors and back, and sets out sheets of them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ldm.util import UserError

logger = logging.getLogger(__name__)

# .heic and .heif are listed although Pillow cannot read them by itself: telling so is better than leaving out
# the photos of a telephone without a word.
IMAGE_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
    }
    | {".ppm", ".tga", ".tif", ".tiff", ".webp"}
)


class ImageError(UserError):
    """A picture, or a folder of pictures, that cannot be used; the message names it."""


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name.

    Files are told by their suffix, those without one by their content. Hidden files are passed over; anything
    else is named in one log line, except the `.txt` that describes an image and `concept.json`.
    Raises ImageError when there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ImageError(f"image folder not found: {folder}")
    if not folder.is_dir():
        raise ImageError(f"{folder} is a file: name the folder that holds the images")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ImageError(f"cannot read image folder {folder}: {error.strerror}") from None
    images = [entry for entry in entries if entry.is_file() and _looks_like_image(entry)]
    # A sample concept's truth lies beside its pictures, and captions may.
    known = {*images, folder / "concept.json", *(image.with_suffix(".txt") for image in images)}
    others = [entry.name + "/" * entry.is_dir() for entry in entries if entry not in known]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not images:
        found = f"it holds {shown}, and subfolders are not searched" if others else "it is empty"
        raise ImageError(f"no images in {folder}: {found}")
    if others:
        logger.info("%s: skipped what is not an image: %s", folder, shown)
    return images


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        with Image.open(path):
            return True
    except Exception:  # a decoder that guesses wrongly may raise anything
        return False


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture from any file Pillow reads: upright (EXIF applied), over white, its first frame.

    16-bit, 32-bit and floating-point greys are scaled to 8 bits. Raises ImageError, which names the file, when
    it is missing, damaged, of an unknown format, or larger than twice `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # Large photos are legitimate; Pillow still refuses what is twice as large as its limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError(f"image not found: {path}") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"cannot read image {path}: not a picture in a format that Pillow knows") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error ... on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"cannot read image {path}: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64).clip(0)
        white = 65535 if image.mode.startswith("I;16") else _white(grey)
        return Image.fromarray(np.rint(grey * (255 / white)).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _white(grey: np.ndarray) -> int:
    """The value of white where the file does not say: of [0, 1], 8, 16 and 31 bits the narrowest that fits."""
    return next((limit for limit in (1, 255, 65535) if grey.max() <= limit), 2**31 - 1)


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1] from a picture."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_pil(image: Tensor) -> Image.Image:
    """A picture from [3, H, W] in [-1, 1], of any floating type and device; values outside are cut off."""
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """The picture with every pixel as a square of `scale` by `scale`."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def image_grid(images: Sequence[Image.Image], columns: int, padding: int = 2, scale: int = 1) -> Image.Image:
    """One white sheet with the pictures in rows of `columns`, each centred in a cell that fits the largest."""
    if not images:
        raise ImageError("a grid needs at least one picture")
    images = [enlarged(image, scale) for image in images]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width = max(image.width for image in images) + padding
    height = max(image.height for image in images) + padding
    sheet = Image.new("RGB", (columns * width + padding, rows * height + padding), "white")
    for i, image in enumerate(images):
        left = padding + i % columns * width + (width - padding - image.width) // 2
        top = padding + i // columns * height + (height - padding - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet


def labelled(image: Image.Image, text: str, font_size: int = 12) -> Image.Image:
    """The picture with a caption below it, broken into lines at the picture's width."""
    lines = _wrap(text, image.width, ImageFont.load_default(size=font_size))
    caption = text_image(text, image.width, _line_height(font_size) * len(lines), font_size)
    sheet = Image.new("RGB", (image.width, image.height + caption.height), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(caption, (0, image.height))
    return sheet


def text_image(text: str, width: int, height: int, font_size: int = 12) -> Image.Image:
    """A white picture with the text in black, broken at its width; what does not fit is cut off."""
    font = ImageFont.load_default(size=font_size)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(_wrap(text, width, font)):
        draw.text((1, i * _line_height(font_size)), line, fill="black", font=font)
    return picture


def _line_height(font_size: int) -> int:
    return math.ceil(font_size * 4 / 3)


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most `width` pixels: broken between words, and inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width - 2:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width - 2:
                lines.append("")
            lines[-1] += letter
    return lines
