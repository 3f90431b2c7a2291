"""Conversions between all formats, and how ComfyUI, InvokeAI, kohya, SD.Next and OneTrainer read them.

The rules of these tools are implemented here from their description.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.embeddings import (
    FORMATS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    paths_for,
    read,
    write,
    write_all,
)
from ldm.embeddings.concept import ENCODER_KINDS
from tests.embeddings.samples import learned, progressive, vectors

PAIRS = list(itertools.product(FORMATS, FORMATS))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("width", [32, 1280])
def test_conversion_from_every_format_to_every_other_and_back(first, second, width, tmp_path):
    start = learned("*" if width == 32 else "<my cat>/../x", count=3, width=width)
    there = read(write_all(start, tmp_path / "1", first)[0])
    beyond = read(write_all(there, tmp_path / "2", second)[0])
    back = read(write_all(beyond, tmp_path / "3", first)[0])
    for found, format in ((there, first), (beyond, second), (back, first)):
        assert found.format == format
        assert found.triggers == start.triggers
        assert torch.equal(found.concepts[0].vectors, start.concepts[0].vectors)
        assert found.concepts[0].encoder == start.concepts[0].encoder
        assert found.metadata == start.metadata


@pytest.mark.parametrize("format", FORMATS)
def test_equal_contents_give_equal_bytes(format, tmp_path):
    paths = [write(learned(), tmp_path / name, format) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_every_float_survives_every_format(tmp_path):
    extreme = torch.tensor([[1e-45, -1.1754944e-38, 3.4028235e38, 0.1, 1 / 3, -0.0, 16777217.0, 2.0**-149]])
    for format in FORMATS:
        path = write(LearnedEmbeddings((Concept("x", extreme),)), tmp_path / format, format)
        found = read(path).concepts[0].vectors
        assert torch.equal(found.view(torch.int32), extreme.view(torch.int32)), format


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "original"])
def test_other_formats_hold_the_vectors_in_use(format, tmp_path):
    path = write(progressive(), tmp_path / "cat", format)
    found = read(write(read(path), tmp_path / "again", "original"))
    assert torch.equal(found.concepts[0].vectors, vectors(4)[:2])
    assert found.progress is None and found.concepts[0].unused is None


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "original"])
def test_formats_of_one_trigger_refuse_two(format, tmp_path):
    both = LearnedEmbeddings((*learned("a").concepts, *learned("b").concepts))
    with pytest.raises(EmbeddingError, match="one trigger, not 'a', 'b'"):
        write(both, tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []
    paths = write_all(both, tmp_path, format)
    assert [read(path).triggers for path in paths] == [["a"], ["b"]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "encoders", [("clip_l", "bert"), ("clip_g", "bert"), ("clip_h", "clip_l"), ("clip_l", "clip_g", "t5")]
)
def test_a_word_has_the_vectors_of_one_text_encoder_or_of_sdxls_two(format, encoders, tmp_path):
    concepts = tuple(Concept("a", vectors(width=ENCODER_KINDS[name].width), name) for name in encoders)
    with pytest.raises(EmbeddingError, match="one text encoder, or of SDXL's two"):
        write(LearnedEmbeddings(concepts), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


def test_unknown_formats_are_listed(tmp_path):
    with pytest.raises(EmbeddingError, match="'pickle'; known are original, safetensors"):
        write(learned(), tmp_path / "x", "pickle")


def test_file_names_stay_in_the_folder_and_are_unique(tmp_path):
    names = ["../../etc/passwd", "/abs", "..", "*", "@", "a/b", "a\\b", "A/B", "con", "<my-cat>", "x" * 200]
    paths = paths_for(names, tmp_path)
    assert {path.parent for path in paths} == {tmp_path}
    assert len({path.name.casefold() for path in paths}) == len(names)
    assert [path.stem for path in paths[:5]] == [
        "etc_passwd",
        "abs",
        "embedding",
        "embedding-2",
        "embedding-3",
    ]
    assert paths[9].stem == "my-cat" and len(paths[10].name) < 120 and paths[8].stem != "con"


def content_of(path: Path) -> Any:
    """Load a file as all these tools do: safetensors by its suffix, others with torch's weights-only loader."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def comfyui(path: Path, key: str = "clip_l") -> Tensor:
    """Take the first value of string_to_param, else the encoder's key, else the first value."""
    content = content_of(path)
    if "string_to_param" in content:
        return next(iter(content["string_to_param"].values()))
    return content[key] if key in content else next(iter(content.values()))


def invokeai(path: Path) -> Tensor:
    """Take known keys first; for another key, the first dimension must be the width."""
    content = content_of(path)
    if "string_to_param" in content:
        assert "string_to_token" in content
        return next(iter(content["string_to_param"].values()))
    if "emb_params" in content:
        return content["emb_params"]
    value = next(iter(content.values()))
    assert value.shape[0] in (768, 1024, 1280), "InvokeAI reports it as incompatible with the model"
    return value[None]


def kohya(path: Path) -> Tensor:
    """Take the first value of string_to_param or of the file."""
    content = content_of(path)
    content = content.get("string_to_param", content)
    return next(iter(content.values()))


def sdnext(path: Path, width: int = 768) -> Tensor:
    """Take all tensors of the encoder's width; of a .pt, only the vectors of `*`."""
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
def test_other_tools_find_the_vectors(reader, format, count, tmp_path) -> None:
    path = write(learned(count=count), tmp_path / f"cat{FORMATS[format].suffix}", format)
    found = reader(path)
    assert found.dtype == torch.float32
    assert torch.equal(found, vectors(count))


def test_the_trigger_is_the_stem_of_the_file_name(tmp_path) -> None:
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
