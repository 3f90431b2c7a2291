from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors import safe_open

from ldm.embeddings import (
    FORMATS,
    Concept,
    EmbeddingError,
    LearnedEmbeddings,
    Progress,
    canonical_path,
    paths_for,
    read,
    write,
    write_all,
)
from tests.embeddings.samples import learned, progressive, vectors

PAIRS = list(itertools.product(FORMATS, FORMATS))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("width", [32, 1280])
def test_every_format_to_every_other_and_back(first, second, width, tmp_path):
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


def test_the_canonical_file(tmp_path):
    path = write(learned(), canonical_path(tmp_path, "<cat>"))
    assert path == tmp_path / "cat.safetensors"
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["emb_params"]
        header = file.metadata()
        assert file.get_tensor("emb_params").dtype == torch.float32
    assert header["modelspec.trigger_phrase"] == "<cat>"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert header["modelspec.resolution"] == "512x512"
    assert header["modelspec.date"] == "2026-01-02T03:04:05+00:00"
    own = json.loads(header["textual_inversion"])
    assert own["initializer"] == "cat" and own["steps"] == 500 and own["seed"] == 23
    assert own["images"] == 5 and own["base_model_hash"].startswith("cc6cb27103")


def test_the_canonical_file_of_now_has_a_date(tmp_path):
    embeddings = LearnedEmbeddings((Concept("x", vectors()),))
    with safe_open(write(embeddings, tmp_path / "x"), "pt") as file:
        assert file.metadata()["modelspec.date"].startswith("20")


def test_ldm_bert_is_never_taken_for_sdxl(tmp_path):
    path = write(learned(width=1280), tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "latent-diffusion-bert/textual-inversion"


def test_the_originals_file_is_what_its_manager_loads(tmp_path):
    both = LearnedEmbeddings((*learned("*").concepts, *learned("@", seed=1).concepts))
    path = write(both, tmp_path / "embeddings.pt", "original")
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        content = torch.load(path, weights_only=True)
    assert isinstance(content["string_to_param"], torch.nn.ParameterDict)
    assert list(content["string_to_param"].keys()) == ["*", "@"]
    assert content["string_to_param"]["@"].shape == (2, 768)
    token = content["string_to_token"]["*"]
    assert token == 265 and token.dtype == torch.int64 and token.shape == ()
    assert read(path).triggers == ["*", "@"]


def test_the_originals_file_keeps_unused_vectors_and_progress(tmp_path):
    path = write(progressive(), tmp_path / "a.pt", "original")
    with torch.serialization.safe_globals([torch.nn.ParameterDict]):
        content = torch.load(path, weights_only=True)
    assert (content["progressive_step"], content["progressive_scale"]) == (150, 100)
    assert torch.equal(content["string_to_param"]["<cat>"], vectors(4))
    found = read(write(read(path), tmp_path / "b.pt", "original"))
    assert found.progress == Progress(150, 100)
    assert torch.equal(found.concepts[0].vectors, vectors(4)[:2])
    assert torch.equal(found.concepts[0].unused, vectors(4)[2:])
    without = torch.load(write(learned(), tmp_path / "c.pt", "original"), weights_only=False)
    assert not {"progressive_step", "progressive_scale"} & set(without)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "original"])
def test_other_formats_hold_the_vectors_in_use(format, tmp_path):
    path = write(progressive(), tmp_path / "cat", format)
    found = read(write(read(path), tmp_path / "again", "original"))
    assert torch.equal(found.concepts[0].vectors, vectors(4)[:2])
    assert found.progress is None and found.concepts[0].unused is None


def test_token_ids_are_kept_until_the_trigger_changes(tmp_path):
    start = LearnedEmbeddings((Concept("sks", vectors(), token=48136),))
    found = read(write(start, tmp_path / "a", "original"))
    assert found.concepts[0].token == 48136
    assert found.renamed({"sks": "zwx"}).concepts[0].token is None


def test_onetrainer_and_diffusers_have_one_key(tmp_path):
    for format, key in (("onetrainer", "emp_params"), ("diffusers", "<cat>")):
        with safe_open(write(learned(), tmp_path / format, format), "pt") as file:
            assert list(file.keys()) == [key]
    with safe_open(write(learned(count=1), tmp_path / "one", "diffusers"), "pt") as file:
        assert file.get_tensor("<cat>").shape == (768,)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "original"])
def test_formats_of_one_word_refuse_two(format, tmp_path):
    both = LearnedEmbeddings((*learned("a").concepts, *learned("b").concepts))
    with pytest.raises(EmbeddingError, match="one trigger, not 'a', 'b'"):
        write(both, tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []
    paths = write_all(both, tmp_path, format)
    assert [read(path).triggers for path in paths] == [["a"], ["b"]]


def test_an_sdxl_pair_is_refused_where_it_has_no_place(tmp_path):
    pair = LearnedEmbeddings((Concept("a", vectors()), Concept("a", vectors(width=1280), "clip_g")))
    with pytest.raises(EmbeddingError, match="one text encoder.*use 'safetensors'"):
        write(pair, tmp_path / "x", "a1111")


def test_unknown_formats_are_listed(tmp_path):
    with pytest.raises(EmbeddingError, match="'pickle'; known are original, safetensors"):
        write(learned(), tmp_path / "x", "pickle")


def test_file_names_never_leave_the_folder_nor_meet(tmp_path):
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
