"""The embedding file as the original saves it: a pickle of placeholder ids and vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import pickles
from ldm.files import atomic_write
from ldm.util import UserError


@dataclass(frozen=True)
class EmbeddingFile:
    """Vectors [N, d] of each placeholder; where vectors are added progressively, how far that is."""

    vectors: dict[str, Tensor]
    progressive_step: int | None = None
    progressive_scale: int | None = None


def write_embeddings(path: str | Path, content: EmbeddingFile, ids: Mapping[str, int]) -> None:
    """Write the file whole: float32 on the CPU, `ids` as "string_to_token"."""
    # Filled from below, because by its front door a ParameterDict refuses names such as "my.cat" or "train".
    params = nn.ParameterDict()
    for string, vectors in content.vectors.items():
        params._keys[string] = None
        params._parameters[string] = nn.Parameter(vectors.detach().to("cpu", torch.float32, copy=True))
    data: dict[str, Any] = {
        "string_to_token": {string: torch.tensor(token) for string, token in ids.items()},
        "string_to_param": params,
    }
    if content.progressive_step is not None:
        data["progressive_step"] = content.progressive_step
        data["progressive_scale"] = content.progressive_scale
    atomic_write(path, lambda file: torch.save(data, file))


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Read a file of `write_embeddings`, of the original under any torch, or of the same layout in plain dicts.

    Raises UserError that names the file for anything else, and for vectors that are no finite [N, d].
    """
    data = pickles.load(path, classes=[nn.ParameterDict], what=f"embedding file '{path}'")
    params = data.get("string_to_param") if isinstance(data, Mapping) else None
    # Read from below as well: files of torch 1.11 and before lack the names that a ParameterDict lists.
    found = dict(getattr(params, "_parameters", params) or {}) if params is not None else {}
    if not found:
        raise UserError(f"embedding file '{path}' holds no 'string_to_param'; it is another kind of file")
    vectors = {}
    for string, value in found.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.dim() not in (1, 2) or not value.is_floating_point():
            raise UserError(f"embedding file '{path}': '{string}' is {shape}, not vectors [N, d]")
        vectors[str(string)] = value.detach().float().reshape(-1, shape[-1])
        if not value.numel() or not vectors[str(string)].isfinite().all():
            raise UserError(f"embedding file '{path}': '{string}' is empty or holds NaN; train it again")
    step, scale = data.get("progressive_step"), data.get("progressive_scale")
    return EmbeddingFile(vectors, *((int(step), int(scale)) if step is not None and scale else (None, None)))
