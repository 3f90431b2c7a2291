"""Pictures that carry an embedding: AUTOMATIC1111's PNG, as a text chunk and in the pixels; WebP in the pixels."""

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

from ldm.embeddings import pixels
from ldm.embeddings.concept import MAX_WIDTH, EmbeddingError
from ldm.images import enlarged

MAX_BYTES = 64 * 2**20
_MAX_PIXELS = 2**24
_MAX_JSON = 32 * 2**20
_CHUNK = "sd-ti-embedding"
_TENSOR = "TORCHTENSOR"
_MIN_HEIGHT = 256


def looks_like_picture(head: bytes) -> bool:
    return head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def load(path: Path) -> dict[str, Any]:
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
                payload = None if text else pixels.reveal(np.asarray(image.convert("RGB")))
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


def save(content: dict[str, Any], preview: Image.Image, shades: Tensor, file: BinaryIO) -> None:
    """Write a PNG of the preview that carries the dict in both ways.

    `shades` [n] in [0, 1] colours the strips beside the preview. Small previews are enlarged.
    """
    scale = max(1, math.ceil(_MIN_HEIGHT / preview.height))
    picture = np.asarray(enlarged(preview.convert("RGB"), scale))
    encoded = json.dumps(content, default=_encode).encode()
    info = PngInfo()
    info.add_text(_CHUNK, base64.b64encode(encoded).decode())
    canvas = pixels.hide(zlib.compress(encoded, 9), picture, shades.numpy())
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
