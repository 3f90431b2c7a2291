"""How ComfyUI, InvokeAI, kohya, SD.Next and OneTrainer take our files: their rules, written anew from a description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.embeddings import FORMATS, Concept, LearnedEmbeddings, canonical_path, read, write, write_all
from tests.embeddings.samples import learned, vectors


def content_of(path: Path) -> Any:
    """As all of them load it: safetensors by the suffix, else torch's weights-only loader."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def comfyui(path: Path, key: str = "clip_l") -> Tensor:
    """string_to_param's first value, else the encoder's own key, else the first value."""
    content = content_of(path)
    if "string_to_param" in content:
        return next(iter(content["string_to_param"].values()))
    return content[key] if key in content else next(iter(content.values()))


def invokeai(path: Path) -> Tensor:
    """Named keys first; with another key the first dimension is taken for the width."""
    content = content_of(path)
    if "string_to_param" in content:
        assert "string_to_token" in content
        return next(iter(content["string_to_param"].values()))
    if "emb_params" in content:
        return content["emb_params"]
    value = next(iter(content.values()))
    assert value.shape[0] in (768, 1024, 1280), "it would say: incompatible with the model"
    return value[None]


def kohya(path: Path) -> Tensor:
    """The first value, or string_to_param's."""
    content = content_of(path)
    content = content.get("string_to_param", content)
    return next(iter(content.values()))


def sdnext(path: Path, width: int = 768) -> Tensor:
    """All tensors of the encoder's width; of a .pt the vectors of `*` alone."""
    content = content_of(path)
    if path.suffix == ".safetensors":
        (found,) = [value for value in content.values() if value.shape[-1] == width]
        return found
    return content["string_to_param"]["*"]


def onetrainer(path: Path) -> Tensor:
    return content_of(path)["emp_params"]


READERS = {
    comfyui: ("safetensors", "a1111", "diffusers", "onetrainer"),
    invokeai: ("safetensors", "a1111"),
    kohya: ("safetensors", "a1111", "diffusers", "onetrainer"),
    sdnext: ("safetensors", "a1111", "diffusers", "onetrainer"),
    onetrainer: ("onetrainer",),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("reader", "format"), [(r, f) for r, formats in READERS.items() for f in formats])
def test_they_find_the_vectors(reader, format, count, tmp_path) -> None:
    path = write(learned(count=count), tmp_path / f"cat{FORMATS[format].suffix}", format)
    found = reader(path)
    assert found.dtype == torch.float32
    assert torch.equal(found.reshape(-1, 768), vectors(count))


def test_invokeai_takes_one_vector_in_diffusers_format(tmp_path) -> None:
    path = write(learned(count=1), tmp_path / "learned_embeds.safetensors", "diffusers")
    assert torch.equal(invokeai(path), vectors(1))


def test_the_prompt_word_is_the_files_stem(tmp_path) -> None:
    assert canonical_path(tmp_path, "my-cat").stem == "my-cat"
    for format in set(FORMATS) - {"original"}:
        (path,) = write_all(learned("my-cat"), tmp_path, format)
        assert path.stem == "my-cat", format


def test_an_sdxl_pair_comes_back_and_is_found_by_encoder(tmp_path) -> None:
    first, second = vectors(), vectors(width=1280)
    pair = LearnedEmbeddings((Concept("cat", first), Concept("cat", second, "clip_g")))
    for format in ("safetensors", "onetrainer"):
        path = write(pair, tmp_path / f"{format}.safetensors", format)
        assert torch.equal(comfyui(path, "clip_l"), first) and torch.equal(comfyui(path, "clip_g"), second)
        found = {concept.encoder: concept.vectors for concept in read(path).concepts}
        assert torch.equal(found["clip_l"], first) and torch.equal(found["clip_g"], second)
        assert read(path).triggers == ["cat"]
