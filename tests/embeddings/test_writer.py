"""Conversions between all formats, and the names of files."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.embeddings import (
    FORMATS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    files_of,
    merge,
    paths_for,
    read,
    write,
    write_all,
)
from ldm.embeddings.concept import ENCODER_KINDS
from tests.embeddings.samples import learned, progressive, vectors

pytestmark = pytest.mark.client_files

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


def test_the_trigger_is_the_stem_of_the_file_name(tmp_path):
    for format in set(FORMATS) - {"original"}:
        (path,) = write_all(learned("my-cat"), tmp_path, format)
        assert path.stem == "my-cat", format


# The keys of all formats that are read, the parts of model files, and what the containers reserve.
KEYS = [
    *("string_to_param", "string_to_token", "name", "step", "sd_checkpoint", "sd_checkpoint_name", "notes"),
    *(
        "emb_params",
        "emp_params",
        "emp_params_out",
        "clip_l",
        "clip_g",
        "clip_h",
        "t5",
        "t5xxl",
        "clip_l_out",
    ),
    *("text_encoders_0", "text_encoders_1", "emb", "emb2", "IN01", "MID", "OUT11", "bundle_emb.cat.clip_l"),
    *("lora_style", "cat.weight", "cat.alpha", "x.lora_up", "model.x", "text_model.x", "state_dict"),
    *("hash", "optimizer_state_dict", "textual_inversion", "progressive_step", "<embed>", "pt", "format"),
    *("_parameters", "_keys", "training", "values", "keys", "a.b", "data", "version", "byteorder"),
    *("__metadata__", "modelspec.trigger_phrase", "TORCHTENSOR", "sd-ti-embedding", "special_params.json"),
]


@pytest.mark.parametrize("format", FORMATS)
def test_words_that_are_keys_of_any_format_come_back(format, tmp_path):
    path = tmp_path / f"cat{FORMATS[format].suffix}"
    for word in KEYS:
        start = learned(word, count=1, width=32 if format == "a1111-png" else 768)
        if (format, word) == ("diffusers", "__metadata__"):
            with pytest.raises(EmbeddingError, match="reserve the name '__metadata__'; give another word"):
                write(start, path, format)
            continue
        found = read(write(start, path, format))
        assert found.triggers == [word] and found.format == format and found.metadata == start.metadata
        assert torch.equal(found.concepts[0].vectors, start.concepts[0].vectors)


ENCODERS = {
    "SD1": ["clip_l"],
    "SD2": ["clip_h"],
    "SDXL": ["clip_l", "clip_g"],
    "SDXL's second": ["clip_g"],
    "LDM": ["bert"],
    "T5": ["t5"],
}


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(
    "count", [1, 6, *(pytest.param(count, marks=pytest.mark.slow) for count in (75, 1024))]
)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_reads_what_it_writes_for_every_family(format, count, family, tmp_path):
    """Also of very many vectors; where a format cannot hold them, nothing is written."""
    concepts = tuple(
        Concept("<cat>", vectors(count, ENCODER_KINDS[kind].width), kind) for kind in ENCODERS[family]
    )
    start = LearnedEmbeddings(concepts, learned().metadata)
    path = tmp_path / f"cat{FORMATS[format].suffix}"
    try:
        write(start, path, format)
    except EmbeddingError as error:
        assert (format, count) == ("a1111-png", 1024) and "use the format a1111" in str(error)
        assert list(tmp_path.iterdir()) == []
        return
    found = merge([read(file) for file in files_of(start, path, format)])
    assert {c.encoder: c.models for c in found.concepts} == {c.encoder: c.models for c in concepts}
    for concept in found.concepts:
        [before] = [c for c in concepts if c.encoder == concept.encoder]
        assert torch.equal(concept.vectors, before.vectors) and concept.trigger == "<cat>"
        assert concept.vectors.shape == (count, ENCODER_KINDS[concept.encoder].width)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_word_of_sdxl_survives_every_conversion(first, second, tmp_path):
    # The order of the two does not matter.
    pair = LearnedEmbeddings(
        (Concept("<cat>", vectors(2, 1280), "clip_g"), Concept("<cat>", vectors(2), "clip_l"))
    )
    there = merge([read(path) for path in write_all(pair, tmp_path / "1", first)])
    back = merge([read(path) for path in write_all(there, tmp_path / "2", second)])
    assert torch.equal(back.vectors_for(768, "clip_l")["<cat>"], vectors(2))
    assert torch.equal(back.vectors_for(1280, "clip_g")["<cat>"], vectors(2, 1280))


def test_several_words_of_sdxl_in_the_originals_format(tmp_path):
    words = [
        Concept(word, vectors(2, ENCODER_KINDS[kind].width, seed), kind)
        for seed, (word, kind) in enumerate(itertools.product(["a", "b", "a.clip_g"], ["clip_l", "clip_g"]))
    ]
    found = read(write(LearnedEmbeddings(tuple(words)), tmp_path / "x.pt", "original"))
    assert [(c.trigger, c.encoder) for c in found.concepts] == [(c.trigger, c.encoder) for c in words]
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(found.concepts, words, strict=True))


@pytest.mark.parametrize("format", ["original", "safetensors"])
def test_an_unknown_encoder_of_two_possible_ones_is_asked_for(format, tmp_path):
    unknown = LearnedEmbeddings((Concept("<cat>", vectors(1, 1280)),))
    with pytest.raises(EmbeddingError, match="SDXL or latent diffusion.*--encoder bert, or clip_g"):
        write(unknown, tmp_path / "x", format)
    assert read(write(unknown.with_encoder("clip_g"), tmp_path / "x", format)).concepts[0].encoder == "clip_g"


def test_file_names_have_no_spaces(tmp_path):
    """ComfyUI ends the word at a space."""
    names = [path.stem for path in paths_for(["my cat", "a\u00a0b", "<x y>", "x_y"], tmp_path)]
    assert names == ["my_cat", "a_b", "x_y", "x_y-2"]


def test_the_second_file_of_a_word_is_not_that_of_another_word(tmp_path):
    words = [
        Concept(word, vectors(1, ENCODER_KINDS[kind].width, seed), kind)
        for seed, (word, kind) in enumerate(itertools.product(["cat", "cat_2"], ["clip_l", "clip_g"]))
    ]
    paths = write_all(LearnedEmbeddings(tuple(words)), tmp_path, "diffusers")
    assert [path.stem for path in paths] == ["cat", "cat_2", "cat_2-2", "cat_2-2_2"]
    assert [read(path).triggers for path in paths] == [["cat"], ["cat"], ["cat_2"], ["cat_2"]]
