"""Reads image files, converts images to tensors and back, and arranges them in grids with captions."""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError, features

from ldm.files import NO_TENSORS, content_kind
from ldm.util import UserError, brief, check_integer, cut, shown

# torch and numpy are imported where they are used: mistakes in a command line are answered without them.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")
Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom in pixels

# Suffixes of caption files beside images, in any case; of several beside one image the first is used.
CAPTION_SUFFIXES = (".txt", ".caption")
# Ends of the names of masks beside images: OneTrainer's, and that of segmentation tools. Of several the first is used.
MASK_ENDINGS = ("-masklabel", "_mask")

# Those of HEIC, AVIF and JPEG XL are listed even where Pillow cannot read them: the photos of a phone should lead to an
# error message instead of being skipped.
_SUFFIXES = """
    .apng .avif .avifs .bmp .gif .heic .heif .hif .jfif .jp2 .jpe .jpeg .jpg .jxl .mpo .pbm .pgm .png .ppm .tga .tif
    .tiff .webp
"""
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# What other files are that people keep among their images.
_OTHER_KINDS = {
    "a camera's RAW file": ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .nef .nrw .orf .pef .raf .raw .rw2 .rwl .srw .x3f",
    "a video": ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .webm .wmv",
    "a vector drawing": ".ai .emf .eps .svg .svgz .wmf",
    "a PDF": ".pdf",
    "a layered drawing": ".clip .kra .procreate .psb .psd .xcf",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _OTHER_KINDS.items() for suffix in suffixes.split()}
EXPORT = "export it as PNG or JPEG"

# Formats that need a plugin of Pillow: its module, the function that registers it (None: importing does), its package.
_PLUGINS = {
    "HEIC": ("pillow_heif", "register_heif_opener", "pillow-heif"),
    "AVIF": ("pillow_avif", None, "pillow-avif-plugin"),
    "JPEG XL": ("pillow_jxl", None, "pillow-jxl-plugin"),
}


# The smallest side of an image, in pixels, and how many images of a folder are read before torch is imported.
SMALLEST_SIDE, LOOKED_INTO = 8, 16


class ImageError(UserError):
    """An image, or a folder of images, that cannot be used; the message names it."""


def list_images(folder: str | Path) -> list[Path]:
    """List the image files directly in `folder`, sorted by name.

    Files are recognised by their suffix, files without a suffix by their content. Hidden files are skipped silently,
    as are `concept.json`, and the caption files and masks beside an image; all other entries are named in one log
    line. A file that is named like a mask (see `masked_stem`) is never listed.

    Raises:
        ImageError: the folder does not exist or contains no image.
    """
    images, skipped, level = _listed(Path(folder))
    if skipped:
        logger.log(level, "%s", brief(f"{folder}: skipped entries that are not images: {skipped}"))
    return images


def check_image_folder(folder: str | Path, zoom: float = 1) -> list[Path]:
    """Return the images as `list_images` does, after a look into each; nothing is logged.

    Of `LOOKED_INTO` images the pixels are read, where that takes milliseconds; of further ones the beginning is.

    Raises:
        ImageError: as `list_images`, as `open_image` for a file that is no image, and as `check_sides`.
    """
    images, _, _ = _listed(Path(folder))
    for number, image in enumerate(images):
        size = _read_by(_verify if number < LOOKED_INTO else _identify, image)
        check_sides(image, size, zoom)
    return images


def check_masks(
    images: Sequence[Path], crops: int = 1, zooms: Sequence[float] = (1.0,), center_crop: bool = True
) -> None:
    """Read the masks of the first `LOOKED_INTO` images; the other arguments are those of `boxes_of`.

    Raises:
        ImageError: as `mask_of`; or a mask marks nothing in any of the boxes.
    """
    masks = mask_files(images)
    for image in images[:LOOKED_INTO]:
        mask = mask_of(image, open_image(image).size if image in masks else (0, 0), masks)
        boxes = () if mask is None else boxes_of(mask.size, crops, zooms, center_crop)
        if mask is not None and not any(mask.crop(box).getbbox() for box in boxes):
            raise mask_outside(image)


def mask_outside(image: Path) -> ImageError:
    """The error for an image whose mask marks nothing in any of its crops."""
    return ImageError(
        f"no square crop of image {image} shows anything of its mask; crop the image around what the mask marks, or "
        "set crops: 3, or center_crop: false"
    )


def boxes_of(
    size: tuple[int, int], crops: int = 1, zooms: Sequence[float] = (1.0,), center_crop: bool = True
) -> list[Box]:
    """The boxes that are cropped from an image of a size (width, height); without `center_crop` all of it is one."""
    width, height = size
    if not center_crop:
        return [(0, 0, width, height)]
    found = squares(width, height, crops, zooms)
    return [(left, top, left + side, top + side) for left, top, side in found]


def squares(width: int, height: int, crops: int, zooms: Sequence[float]) -> list[tuple[int, int, int]]:
    """Return the different squares (left, top, side) of an image, those of the first zoom first.

    Zoom 1 is the largest possible square, zoom 2 has half its side. Along each axis with free space there are
    `crops` positions, distributed evenly from end to end; a single one is in the middle.
    """
    found: dict[tuple[int, int, int], None] = {}
    for zoom in zooms:
        side = round(min(width, height) / zoom)
        for top in _positions(height - side, crops):
            for left in _positions(width - side, crops):
                found[left, top, side] = None
    return list(found)


def _positions(free: int, count: int) -> list[int]:
    return [free // 2] if count == 1 else [free * i // (count - 1) for i in range(count)]


def _listed(folder: Path) -> tuple[list[Path], str, int]:
    """The images in a folder; what else is there, with a remedy if it may be images; and the level to log that at."""
    if not os.path.exists(folder):  # False for what no path can be
        raise ImageError(f"image folder not found: {folder}")
    if not folder.is_dir():
        raise ImageError(f"{folder} is a file; name the folder that holds the images")
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ImageError(f"cannot read image folder {folder}: {error.strerror}") from None
    readable = [entry for entry in entries if entry.is_file() and _looks_like_image(entry)]
    images = [entry for entry in readable if masked_stem(entry) is None]
    stems = {image.stem for image in images}
    stray = [entry for entry in readable if masked_stem(entry) not in {None, *stems}]
    others = [entry for entry in entries if entry not in readable and not _may_lie_beside(entry, stems)]
    others = [*stray, *others]
    shown = ", ".join(map(_described, others[:5])) + (
        f" and {len(others) - 5} more" if len(others) > 5 else ""
    )
    remedy = "; rename what is no mask of another image" if stray else ""
    remedy += f"; {EXPORT}" if any(entry.suffix.lower() in _KIND_OF_SUFFIX for entry in others) else ""
    if not images:
        reason = f"it holds {shown}, and subfolders are not searched" if others else "it is empty"
        raise ImageError(f"no images in {folder}: {reason}{remedy}")
    return images, shown + remedy, logging.WARNING if remedy else logging.INFO


def masked_stem(path: Path) -> str | None:
    """The stem of the image that a file is the mask of, by its name; None for a name that is no mask's."""
    ending = next((ending for ending in MASK_ENDINGS if path.stem.lower().endswith(ending)), None)
    return path.stem[: -len(ending)] or None if ending else None


def mask_files(images: Sequence[Path]) -> dict[Path, Path]:
    """The masks beside images: files in any format for images, named as `masked_stem` says."""
    beside: dict[tuple[Path, str], Path] = {}
    for folder in {image.parent for image in images}:
        files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        for ending in MASK_ENDINGS:
            for file in sorted(files):
                stem = masked_stem(file)
                if stem is not None and file.stem.lower().endswith(ending):
                    beside.setdefault((folder, stem), file)
    pairs = ((image, beside.get((image.parent, image.stem))) for image in images)
    return {image: mask for image, mask in pairs if mask is not None}


def count_masked(images: Sequence[Path]) -> int:
    """How many images have a mask beside them or an alpha channel, whether or not it can be used."""
    beside = mask_files(images)
    return sum(image in beside or open_alpha(image) is not None for image in images)


def no_masks(mask_weight: float, image: Path) -> ImageError:
    """The error for masks that were asked for where no image, such as this one, has any."""
    return ImageError(
        f"mask_weight is {mask_weight}, but no image has a mask; put '{shown(image.stem)}-masklabel.png' beside "
        f"'{shown(str(image), 80)}', give it an alpha channel, or remove mask_weight"
    )


def _may_lie_beside(entry: Path, stems: set[str]) -> bool:
    """Whether an entry is expected among images with these stems: a caption, or the description of a concept."""
    return entry.name == "concept.json" or (
        entry.stem in stems and entry.suffix.lower() in CAPTION_SUFFIXES and entry.is_file()
    )


def _described(entry: Path) -> str:
    kind = _KIND_OF_SUFFIX.get(entry.suffix.lower())
    if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
        kind = "a mask by its name, without its image"
    return cut(entry.name, 60) + "/" * entry.is_dir() + (f" ({kind})" if kind else "")


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in IMAGE_SUFFIXES
    try:
        with Image.open(path):
            return True
    except Exception:  # a decoder may raise anything for a file that is not of its format
        return _format_of(path) in _PLUGINS


def open_image(path: str | Path | Image.Image) -> Image.Image:
    """Read an image file as RGB: upright (EXIF orientation applied), over a white background, its first frame.

    An image that is open already becomes the same, and stays as it is itself.

    16-bit, 32-bit and floating-point greyscale images are scaled to 8 bits. HEIC, AVIF and JPEG XL are read where
    Pillow, or a plugin that is installed, can.

    Raises:
        ImageError: the file is missing, damaged, of an unknown format, or has more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels; or it is neither an image nor a file's name.
    """
    if isinstance(path, Image.Image):
        return _converted(path)
    if not isinstance(path, (str, Path)):
        raise ImageError(
            f"{type(path).__name__} is no type of images; give PIL images, made of arrays by Image.fromarray, or files"
        )
    return _read_by(_read, Path(path))


def _read_by(read: Callable[[Path], _Result], path: Path) -> _Result:
    """What a reader makes of an image file; ImageError if it is none that can be read."""
    kind = _KIND_OF_SUFFIX.get(path.suffix.lower())
    # Of a RAW file Pillow would read the small preview, and of others it only knows the beginning.
    if kind in ("a camera's RAW file", "a video", "a PDF") and path.exists():
        raise ImageError(f"cannot read image {path}: it is {kind}; {EXPORT}")
    try:
        try:
            return read(path)
        except UnidentifiedImageError:
            if not _register_plugin(_format_of(path)):
                raise
            return read(path)
    except FileNotFoundError:
        raise ImageError(f"image not found: {path}") from None
    except UnidentifiedImageError:
        raise ImageError(f"cannot read image {path}: {_why_unidentified(_format_of(path))}") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error ... on damaged files
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageError(f"cannot read image {path}: {reason}") from None


def open_alpha(path: str | Path | Image.Image) -> Image.Image | None:
    """Read the alpha channel of an image that `open_image` reads, upright, as greyscale; None if it is opaque."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
            if not _transparent(image):
                return None
            image.load()
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _converted(image: Image.Image) -> Image.Image:
    """A copy of an open image as `open_image` returns it."""
    try:
        image.load()
        if not image.width * image.height:
            raise ImageError("an image has no pixels; remove it")
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # it is closed, or its file is damaged
        raise ImageError(f"an image cannot be used ({error}); give its file's name") from None


def check_sides(path: Path, size: tuple[int, int], zoom: float = 1) -> None:
    """Raise ImageError if an image of a size (width, height) has sides that are too small for its crops."""
    least = math.ceil(SMALLEST_SIDE * zoom)
    if min(size) < least:
        at = f" at zoom {zoom:g}" if zoom > 1 else ""
        raise ImageError(
            f"image {path} is {size[0]}x{size[1]} pixels: each side needs at least {least}{at}; use a larger image"
        )


def mask_of(path: Path, size: tuple[int, int], masks: Mapping[Path, Path]) -> Image.Image | None:
    """The mask of an image of a size (width, height): that beside it in `masks`, or its alpha channel, if it has any.

    Raises:
        ImageError: as `open_mask`, the sizes differ, or the image is transparent everywhere.
    """
    if path not in masks:
        alpha = open_alpha(path)
        if alpha is not None and alpha.getextrema() == (0, 0):
            raise ImageError(f"image {path} is transparent everywhere: save it without its alpha channel")
        return alpha
    mask = open_mask(masks[path])
    if mask.size != size:
        raise ImageError(
            f"mask {masks[path]} is {mask.width}x{mask.height} pixels, but its image is {size[0]}x{size[1]}; make them "
            "equal"
        )
    return mask


def open_mask(path: str | Path) -> Image.Image:
    """Read a mask as greyscale, upright: white marks what counts, and transparent is black.

    Raises:
        ImageError: see `open_image`; or the mask is black everywhere.
    """
    mask, alpha = open_image(path).convert("L"), open_alpha(path)
    mask = mask if alpha is None else ImageChops.multiply(mask, alpha)
    if mask.getextrema() == (0, 0):
        raise ImageError(f"mask {path} is black everywhere: paint white what it should mark, or remove it")
    return mask


def _identify(path: Path) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            return image.size


def _verify(path: Path) -> tuple[int, int]:
    """The size of an image whose pixels can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            size = image.size
            if image.format == "PNG":  # its checksums say as much as its pixels, and sooner
                image.verify()
            else:
                # A JPEG is decoded at its least size, other formats as they are.
                image.draft("RGB", (64, 64))
                image.load()
            return size


def _read(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Large photos are legitimate; Pillow raises an error for those of twice its limit. Its other warnings are
        # about metadata.
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            image.load()
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a phone's MPO holds previews
                _tell_frames(str(path), image.n_frames)  # type: ignore[attr-defined]
                image.seek(0)
                image.load()
            return _to_rgb(ImageOps.exif_transpose(image))


@lru_cache(maxsize=4096)
def _tell_frames(path: str, frames: int) -> None:
    logger.info("%s has %d frames: the first one is used", path, frames)


def _register_plugin(format: str) -> bool:
    """Register the plugin of Pillow for a format; False if there is none or it is not installed."""
    module, function, _ = _PLUGINS.get(format, ("", None, ""))
    try:
        plugin = importlib.import_module(module) if module else None
    except ImportError:
        return False
    if plugin is not None and function is not None:
        getattr(plugin, function)()
    return plugin is not None


def _format_of(path: Path) -> str:
    """What a file is that Pillow does not know, by its first bytes: a key of `_PLUGINS` or a phrase; or empty."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[4:8] == b"ftyp":
        brands = {
            head[8:12],
            *(head[i : i + 4] for i in range(16, min(64, int.from_bytes(head[:4], "big")), 4)),
        }
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}:
            return "HEIC"
        return "a camera's RAW file" if b"crx " in brands else "a video"
    if head.startswith(b"\xff\x0a") or head[4:8] == b"JXL ":
        return "JPEG XL"
    if head.startswith((b"\x1aE\xdf\xa3", b"FLV")) or (head.startswith(b"RIFF") and head[8:12] == b"AVI "):
        return "a video"
    if head.startswith(b"%PDF"):
        return "a PDF"
    if b"<svg" in head:
        return "a vector drawing"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "a TIFF of a kind that Pillow cannot read, such as 16 bits per colour"
    kind = content_kind(head)
    if kind in ("empty", "web page", "Git LFS pointer"):
        return NO_TENSORS[kind]
    return _KIND_OF_SUFFIX.get(path.suffix.lower(), "")


def _why_unidentified(format: str) -> str:
    if format in _PLUGINS:
        package = _PLUGINS[format][2]
        if (format == "AVIF" and features.check("avif")) or _register_plugin(format):
            return f"it is {format}, but damaged or of an unknown kind; {EXPORT}"
        return f"{format} needs a plugin of Pillow: pip install {package}, or {EXPORT}"
    if format.startswith("is "):
        return f"it {format}"
    return f"it is {format}; {EXPORT}" if format else "not an image in a format that Pillow knows"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        import numpy as np

        grey = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
        white = 65535 if image.mode.startswith("I;16") else _white(grey)
        return Image.fromarray(np.rint(grey * (255 / white)).astype(np.uint8)).convert("RGB")
    if _transparent(image):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _transparent(image: Image.Image) -> bool:
    return image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info


def _white(grey: np.ndarray) -> int:
    """The value of white for a file that does not define it: the smallest of 1, 8, 16 and 31 bits that fits."""
    return next((limit for limit in (1, 255, 65535) if grey.max() <= limit), 2**31 - 1)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to float32 [3, H, W] in [-1, 1]."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_pil(image: Tensor) -> Image.Image:
    """Convert [3, H, W] in [-1, 1], of any floating type and device, to an image; other values are clamped."""
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def fitted(
    image: Image.Image, width: int, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Crop the largest central part of an image with the shape of `width` x `height`, and resize it to that."""
    scale = min(image.width / width, image.height / height)
    part = (min(image.width, round(scale * width)), min(image.height, round(scale * height)))
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    return image.crop((left, top, left + part[0], top + part[1])).resize((width, height), resample)


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """Enlarge an image so that every pixel becomes a square of `scale` by `scale` pixels."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def image_grid(images: Sequence[Image.Image], columns: int, padding: int = 2, scale: int = 1) -> Image.Image:
    """Arrange images on white in rows of `columns`, each centred in a cell that fits the largest."""
    if not images:
        raise ImageError("a grid needs at least one image")
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


def grid(
    images: Iterable[Image.Image | str | Path],
    columns: int | None = None,
    labels: Iterable[object] = (),
    *,
    smallest: int = 128,
    largest: int | None = 512,
    padding: int = 4,
) -> Image.Image:
    """Arrange images, or image files, in rows of `columns` (default: one row), with their labels below them.

    Images narrower than `smallest` pixels are enlarged by a whole factor, so that small ones can be seen; those with a
    side above `largest` pixels are reduced to it.

    Raises:
        ImageError: there is no image, or a file cannot be read, or there are not as many labels as images.
    """
    if isinstance(images, (str, Path)) or not isinstance(images, Iterable):
        raise ImageError(f"images is {shown(images)}; give a list of images or image files")
    if columns is not None:
        check_integer(columns, "columns", error=ImageError)
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise ImageError(f"labels is {shown(labels)}; give a list with a text for each image")
    images, texts = list(images), [str(label) for label in labels]
    if texts and len(texts) != len(images):
        raise ImageError(
            f"there are {len(images)} images and {len(texts)} labels; give one label for each image"
        )
    cells = []
    for given in images:
        image = open_image(given)
        if largest is not None:
            image.thumbnail((largest, largest))
        cells.append(enlarged(image, max(1, -(-smallest // image.width))))
    if texts:
        cells = [labelled(cell, text) for cell, text in zip(cells, texts, strict=True)]
    return image_grid(cells, columns or max(1, len(cells)), padding)


def labelled(image: Image.Image, text: str, font_size: int = 12) -> Image.Image:
    """Add a caption below an image, broken into lines at the width of the image."""
    lines = _wrap(text, image.width, ImageFont.load_default(size=font_size))
    caption = text_image(text, image.width, _line_height(font_size) * len(lines), font_size)
    sheet = Image.new("RGB", (image.width, image.height + caption.height), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(caption, (0, image.height))
    return sheet


def text_image(text: str, width: int, height: int, font_size: int = 12) -> Image.Image:
    """Draw text in black on white, broken into lines at `width`; text beyond `height` is cut off."""
    font = ImageFont.load_default(size=font_size)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(_wrap(text, width, font)):
        draw.text((1, i * _line_height(font_size)), line, fill="black", font=font)
    return image


def _line_height(font_size: int) -> int:
    return math.ceil(font_size * 4 / 3)


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Break text into lines of at most `width` pixels, between words or inside a word longer than a line."""
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
