"""Images that carry an embedding: AUTOMATIC1111's PNG, as a text chunk and in the pixels; WebP in the pixels."""

from __future__ import annotations

import base64
import binascii
import json
import math
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.embeddings.concept import MAX_WIDTH, EmbeddingError
from ldm.images import enlarged

_CELL = 8  # side of the squares of the visible pattern on the strips


def noise(count: int) -> np.ndarray:
    """[count] uint8: the linear congruential numbers that whiten the payload (Numerical Recipes' constants)."""
    powers = np.ones(count, np.uint32)
    powers[1:] = np.cumprod(np.full(max(count - 1, 0), 1664525, np.uint32), dtype=np.uint32)
    seeds = np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223)
    return (seeds % 255).astype(np.uint8)


def hide(payload: bytes, picture: np.ndarray, shades: np.ndarray) -> np.ndarray:
    """[H, W', 3] uint8: the picture [H, W, 3] between two strips that hold the payload.

    The left strip holds the low halves of the bytes, the right one the high halves, both in the low halves of
    their pixels. `shades` in [0, 1] colour the strips and mean nothing.
    """
    height = picture.shape[0]
    data = np.frombuffer(payload, np.uint8)
    # Padded by repetition to whole columns; the compressed stream inside knows its own end.
    size = -(-(len(data) + 1) // (3 * height)) * 3 * height
    data = np.resize(data, size).reshape(height, -1, 3)
    whitened = noise(size).reshape(data.shape) & 15
    pattern = _pattern(data.shape[:2], shades)[..., None] << 4
    left = (data & 15 ^ whitened) | pattern
    right = (data >> 4 ^ whitened) | pattern[:, ::-1]
    line = np.zeros((height, 1, 3), np.uint8)
    return np.concatenate([left, line, picture, line, right], axis=1)


def reveal(canvas: np.ndarray) -> bytes | None:
    """The bytes hidden in [H, W, 3] uint8, padding included; None if there is no sign of any."""
    lit = (canvas > 0).all(axis=2)
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        return None
    halves = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    lines = np.flatnonzero(halves.sum(axis=(0, 2)) == 0)
    if len(lines) < 2:
        return None
    low, high = halves[:, : lines[0]], halves[:, lines[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        return None
    whitened = noise(low.size).reshape(low.shape) & 15
    return ((high ^ whitened) << 4 | (low ^ whitened)).tobytes()


def _pattern(shape: tuple[int, int], shades: np.ndarray) -> np.ndarray:
    """[H, W] uint8 in 2..15: never black, because readers cut black borders off."""
    rows, columns = (-(-length // _CELL) for length in shape)
    cells = np.resize(shades, rows * columns).reshape(rows, columns)
    cells = 2 + np.rint(np.clip(cells, 0, 1) * 13).astype(np.uint8)
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)[: shape[0], : shape[1]]


MAX_IMAGE_BYTES = 64 * 2**20
_MAX_PIXELS = 2**24
_MAX_JSON = 32 * 2**20
_CHUNK = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MIN_HEIGHT = 256


def looks_like_image(head: bytes) -> bool:
    return head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def load_image_payload(path: Path) -> dict[str, Any]:
    """The dict that a picture carries; raises EmbeddingError if it is damaged or carries none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "WEBP")) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise EmbeddingError(
                        f"the picture has {image.width} x {image.height} pixels; at most {_MAX_PIXELS} are read"
                    )
                image.load()
                text = getattr(image, "text", {}).get(_CHUNK)
                payload = None if text else reveal(np.asarray(image.convert("RGB")))
    except EmbeddingError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise EmbeddingError(f"the picture is damaged ({str(error)[:80]})") from error
    if text is None and payload is None:
        raise EmbeddingError("the picture carries no embedding (one re-saved by a web site has lost it)")
    try:
        encoded = base64.b64decode(text) if text else _inflate(payload)
        if len(encoded) > _MAX_JSON:
            raise EmbeddingError("the text in the picture is larger than any embedding's")
        content = json.loads(encoded, object_hook=_decode)
    except EmbeddingError:
        raise
    except (ValueError, RecursionError, binascii.Error, zlib.error) as error:
        raise EmbeddingError(
            "the picture carries no embedding, or a damaged one (was it re-saved?)"
        ) from error
    if not isinstance(content, dict):
        raise EmbeddingError("the picture carries something that is no embedding")
    return content


def save_image_payload(content: dict[str, Any], preview: Image.Image, shades: Tensor, file: BinaryIO) -> None:
    """Write a PNG of the preview that carries the dict in both ways.

    `shades` [n] in [0, 1] colours the strips beside the preview. Small previews are enlarged.
    """
    scale = max(1, math.ceil(_MIN_HEIGHT / preview.height))
    picture = np.asarray(enlarged(preview.convert("RGB"), scale))
    encoded = json.dumps(content, default=_encode).encode()
    info = PngInfo()
    info.add_text(_CHUNK, base64.b64encode(encoded).decode())
    canvas = hide(zlib.compress(encoded, 9), picture, shades.numpy())
    Image.fromarray(canvas).save(file, format="PNG", pnginfo=info)


def _inflate(payload: bytes | None) -> bytes:
    """Decompress no more than the limit, whatever the stream holds."""
    stream = zlib.decompressobj()
    encoded = stream.decompress(payload or b"", _MAX_JSON + 1)
    if not stream.eof and len(encoded) <= _MAX_JSON:
        raise zlib.error("cut off")
    return encoded


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: value.tolist()}
    raise TypeError(f"{type(value).__name__} has no place in a picture")


def _decode(value: dict[str, Any]) -> Any:
    """The tensor that `{"TORCHTENSOR": nested lists}` stands for."""
    if set(value) != {_TENSOR}:
        return value
    rows = value[_TENSOR]
    numbers = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], list) else rows
    if not isinstance(numbers, list) or len(numbers) > MAX_WIDTH:
        raise EmbeddingError("the vectors in the picture are no list of numbers")
    try:
        return torch.tensor(rows, dtype=torch.float64).float()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise EmbeddingError("the vectors in the picture are no list of numbers") from error
