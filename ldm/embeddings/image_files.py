"""Images that carry an embedding: AUTOMATIC1111's PNG, as a text chunk and in the pixels; WebP in the pixels."""

from __future__ import annotations

import base64
import binascii
import json
import math
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.embeddings.concept import MAX_WIDTH, EmbeddingError
from ldm.images import enlarged
from ldm.outlines import Unread, is_tensor
from ldm.util import shown

if TYPE_CHECKING:
    from torch import Tensor

_CELL = 8  # side of the squares of the visible pattern on the strips


def whitening(count: int) -> np.ndarray:
    """Return [count] uint8: pseudo-random numbers that the payload is mixed with (LCG of Numerical Recipes)."""
    powers = np.ones(count, np.uint32)
    powers[1:] = np.cumprod(np.full(max(count - 1, 0), 1664525, np.uint32), dtype=np.uint32)
    seeds = np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223)
    return (seeds % 255).astype(np.uint8)


def hide_bytes(payload: bytes, image: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """Return the image [H, W, 3] uint8 between two strips that hold the payload: [H, W', 3] uint8.

    The left strip holds the low 4 bits of each byte, the right one the high 4 bits, both in the low 4 bits of
    their pixels. `shades` in [0, 1] only colour the strips.
    """
    height = image.shape[0]
    data = np.frombuffer(payload, np.uint8)
    # Filled up with repetitions to whole columns; the compressed stream marks its own end.
    size = -(-(len(data) + 1) // (3 * height)) * 3 * height
    data = np.resize(data, size).reshape(height, -1, 3)
    whitened = whitening(size).reshape(data.shape) & 15
    pattern = _pattern(data.shape[:2], shades)[..., None] << 4
    left = (data & 15 ^ whitened) | pattern
    right = (data >> 4 ^ whitened) | pattern[:, ::-1]
    line = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([left, line, image, line, right], axis=1)


def find_hidden_bytes(canvas: np.ndarray, most: int = 2**24) -> bytes | None:
    """Return the bytes hidden in [H, W, 3] uint8, padding included; None if there are none, or more than `most`."""
    lit = canvas.min(axis=2) > 0
    rows, columns = np.flatnonzero(np.any(lit, axis=1)), np.flatnonzero(np.any(lit, axis=0))
    if not len(rows):
        return None
    inner = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    lines = np.flatnonzero(~np.bitwise_or.reduce(inner & 15, axis=(0, 2)).astype(bool))
    if len(lines) < 2:
        return None
    low, high = inner[:, : lines[0]] & 15, inner[:, lines[-1] + 1 :] & 15
    if low.shape != high.shape or not 0 < low.size <= most:
        return None
    whitened = whitening(low.size).reshape(low.shape) & 15
    return ((high ^ whitened) << 4 | (low ^ whitened)).tobytes()


def _pattern(shape: tuple[int, int], shades: np.ndarray) -> np.ndarray:
    """Return [H, W] uint8 in 2..15; never black, because readers crop black borders."""
    rows, columns = (-(-length // _CELL) for length in shape)
    cells = np.resize(shades, rows * columns).reshape(rows, columns)
    cells = 2 + np.rint(np.clip(cells, 0, 1) * 13).astype(np.uint8)
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[: shape[0], : shape[1]]


MAX_IMAGE_BYTES = 64 * 2**20
_MAX_PIXELS = 2**24
_MAX_JSON = 32 * 2**20
_MAX_TENSORS = 256
_MAX_NUMBERS = 2**20  # at most 26 MB of text
_SLACK = 2**20
# At most as many bytes of text for each byte of the file: numbers that were learned compress to less than half.
_MAX_RATIO = 16
_CHUNK = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MIN_HEIGHT = 256


def load_image_payload(path: Path, numbers: bool = True) -> dict[str, Any]:
    """Return the dict that an image carries, with tensors, or without `numbers` with `Unread` in their places.

    Raises EmbeddingError if it is damaged, carries none, or needs far more memory than the file has bytes.
    """
    size = path.stat().st_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "WEBP")) as image:
                # The strips of an embedding are noise, which does not compress.
                most = min(_MAX_PIXELS, 4 * _MAX_RATIO * size + _SLACK)
                if image.width * image.height > most:
                    raise EmbeddingError(
                        f"the image has {image.width} x {image.height} pixels; at most {most} are read of its size"
                    )
                image.load()
                text = getattr(image, "text", {}).get(_CHUNK)
                payload = None if text else find_hidden_bytes(np.asarray(image.convert("RGB")), 2 * size)
    except EmbeddingError:
        raise
    except Exception as error:  # Pillow's decoders raise many classes
        raise EmbeddingError(f"the image is damaged ({shown(str(error))})") from error
    if text is None and payload is None:
        raise EmbeddingError("the image carries no embedding (web sites that re-save images remove it)")
    try:
        return _decoded(text, payload, min(_MAX_JSON, _MAX_RATIO * size + _SLACK), numbers)
    except EmbeddingError:
        raise
    except (ValueError, RecursionError, binascii.Error, zlib.error) as error:
        raise EmbeddingError("the image carries no embedding, or a damaged one (was it re-saved?)") from error


def _decoded(text: str | None, payload: bytes | None, most: int, numbers: bool) -> dict[str, Any]:
    """Return the dict in a text chunk or in the bytes of the pixels, whose JSON has at most `most` bytes."""
    encoded = base64.b64decode(text) if text else _inflate(payload, most)
    if len(encoded) > most:
        raise EmbeddingError("the text in the image is larger than any embedding's")
    tensors = 0

    def decode(value: dict[str, Any]) -> Any:
        nonlocal tensors
        tensors += _TENSOR in value
        if tensors > _MAX_TENSORS:
            raise EmbeddingError(
                f"the image carries more than {_MAX_TENSORS} tensors; it is not an embedding"
            )
        return _tensor_or_dict(value, numbers)

    content = json.loads(encoded, object_hook=decode)
    if not isinstance(content, dict):
        raise EmbeddingError("the image carries something that is not an embedding")
    return content


def save_image_payload(content: dict[str, Any], preview: Image.Image, shades: Tensor, file: BinaryIO) -> None:
    """Write a PNG of the preview that carries the dict twice: in a text chunk and in strips of pixels.

    `shades` [n] in [0, 1] colour the strips. Small previews are enlarged. Raises EmbeddingError for what
    `load_image_payload` would refuse: too many numbers, or too large a preview.
    """
    tensors = [value for part in content.values() for value in _tensors(part)]
    if (numbers := sum(tensor.numel() for tensor in tensors)) > _MAX_NUMBERS:
        raise EmbeddingError(
            f"an image holds at most {_MAX_NUMBERS:,} numbers, not {numbers:,}; use the format a1111"
        )
    scale = max(1, math.ceil(_MIN_HEIGHT / preview.height))
    pixels = np.asarray(enlarged(preview.convert("RGB"), scale))
    encoded = json.dumps(content, default=_encode).encode()
    payload = zlib.compress(encoded, 9)
    canvas = hide_bytes(payload, pixels, shades.numpy())
    if canvas.shape[0] * canvas.shape[1] > _MAX_PIXELS:
        raise EmbeddingError(
            f"the image would have {canvas.shape[1]} x {canvas.shape[0]} pixels, more than readers load; choose a "
            "smaller preview"
        )
    info = PngInfo()
    info.add_text(_CHUNK, base64.b64encode(encoded).decode())
    Image.fromarray(canvas).save(file, format="PNG", pnginfo=info)


def _inflate(payload: bytes | None, most: int) -> bytes:
    """Decompress at most `most` + 1 bytes."""
    stream = zlib.decompressobj()
    encoded = stream.decompress(payload or b"", most + 1)
    if not stream.eof and len(encoded) <= most:
        raise zlib.error("cut off")
    return encoded


def _tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else [value]
    return [item for item in values if is_tensor(item)]


def _encode(value: Any) -> Any:
    if is_tensor(value):
        return {_TENSOR: value.tolist()}
    raise TypeError(f"{type(value).__name__} cannot be stored in an image")


def _tensor_or_dict(value: dict[str, Any], as_tensor: bool) -> Any:
    """Return the tensor for `{"TORCHTENSOR": nested lists}`, and any other dict unchanged."""
    if set(value) != {_TENSOR}:
        return value
    rows = value[_TENSOR]
    numbers = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], list) else rows
    if not isinstance(numbers, list) or len(numbers) > MAX_WIDTH:
        raise EmbeddingError("the vectors in the image are not lists of numbers")
    try:
        array = np.array(rows)
        if array.dtype.kind not in "fiu":
            raise ValueError("there are other things than numbers")
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            array = array.astype(np.float32)
        if not as_tensor:
            return Unread(array.shape, "float32", array.tobytes)

        import torch

        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise EmbeddingError("the vectors in the image are not lists of numbers") from error
