"""The original's file, and AUTOMATIC1111's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Progress, read, write
from ldm.embeddings.pickle_formats import words_without_token
from tests.embeddings.samples import GOLDEN, a1111_dict, learned, progressive, vectors

pytestmark = pytest.mark.client_files


@pytest.mark.parametrize(
    "case", ["clip_one_vector", "clip_three_vectors", "bert_one_vector", "vq_one_vector"]
)
def test_reads_the_originals_files(case):
    found = read(GOLDEN / case / "embeddings.pt")
    [concept] = found.concepts
    assert found.format == "original" and concept.trigger == "*"
    assert concept.token == (41 if case == "bert_one_vector" else 265)
    assert concept.vectors.shape == {"clip_three_vectors": (3, 32), "bert_one_vector": (1, 64)}.get(
        case, (1, 32)
    )


def test_reads_the_layout_of_old_torch():
    found = read(GOLDEN / "embeddings_torch_1_10_layout.pt")
    assert found.triggers == ["*", "@"]
    star, at = found.concepts
    assert star.vectors.shape == (2, 32) and at.vectors.shape == (1, 32)
    assert star.vectors.sum().item() == pytest.approx(-0.16457687)
    assert at.vectors.sum().item() == pytest.approx(-0.02920608)
    assert (star.token, at.token) == (265, 287)


@pytest.mark.parametrize("plain", [False, True])
def test_a_progressive_run_of_the_original(plain, tmp_path):
    """Each trigger's vectors are divided into those in use and the unused ones, whatever their number."""
    words = {"a": vectors(4), "b": vectors(1, seed=1), "c": vectors(2, seed=2)}
    content = {
        "string_to_token": {},
        "string_to_param": words if plain else torch.nn.ParameterDict(words),
        "progressive_step": 150,
        "progressive_scale": 100,
    }
    torch.save(content, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.progress == Progress(150, 100)
    assert [len(concept.vectors) for concept in found.concepts] == [2, 1, 2]
    assert torch.equal(found.concepts[0].unused, vectors(4)[2:])
    assert [concept.unused for concept in found.concepts[1:]] == [None, None]


@pytest.mark.parametrize(
    ("step", "scale"),
    [
        (-1, 100),
        (True, 100),
        (2**80, 100),
        (150.0, 100),
        ("150", 100),
        (150, 0),
        (150, -1),
        (150, None),
        (None, 9),
    ],
)
def test_impossible_progress_in_a_file_is_ignored(step, scale, tmp_path):
    content = {"string_to_param": {"a": vectors(4)}, "progressive_step": step, "progressive_scale": scale}
    torch.save(content, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found.progress is None and torch.equal(found.concepts[0].vectors, vectors(4))


def test_width_1280_is_bert_only_in_the_originals_file(tmp_path):
    values = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(1, 1280))})
    torch.save({"string_to_token": {"*": torch.tensor(1008)}, "string_to_param": values}, tmp_path / "a.pt")
    assert read(tmp_path / "a.pt").concepts[0].encoder == "bert"
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "b.safetensors")
    found = read(tmp_path / "b.safetensors")
    assert found.concepts[0].encoder is None
    with pytest.raises(EmbeddingError, match="BERT.*SDXL|SDXL.*BERT"):
        found.vectors_for(1280, "bert")
    with pytest.raises(EmbeddingError, match="give the encoder"):
        write(found, tmp_path / "c.safetensors")
    assert list(found.with_encoder("bert").vectors_for(1280, "bert")) == ["b"]
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "d.safetensors", header)
    assert read(tmp_path / "d.safetensors").concepts[0].encoder == "clip_g"


def test_the_originals_file_has_the_layout_that_its_manager_loads(tmp_path):
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


def test_token_ids_are_kept_until_the_trigger_changes(tmp_path):
    start = LearnedEmbeddings((Concept("sks", vectors(), token=48136),))
    found = read(write(start, tmp_path / "a", "original"))
    assert found.concepts[0].token == 48136
    assert found.renamed({"sks": "zwx"}).concepts[0].token is None


@pytest.mark.parametrize("count", [1, 3])
def test_our_pt_has_the_values_of_automatic1111(count, tmp_path):
    embeddings = learned("cat", count)
    path = write(embeddings, tmp_path / "cat.pt", "a1111")
    content = torch.load(path, weights_only=True)
    assert len(content["string_to_param"]) == 1
    vectors = content["string_to_param"]["*"]
    assert vectors.dtype == torch.float32 and vectors.shape == (count, 768)
    assert torch.equal(vectors, embeddings.concepts[0].vectors)
    assert (content["name"], content["step"], content["string_to_token"]) == ("cat", 500, {"*": 265})
    assert (content["sd_checkpoint"], content["sd_checkpoint_name"]) == ("cc6cb27103", "sd-v1-5")


def test_the_trigger_of_an_a1111_image_is_the_name_inside(tmp_path, every_file):
    path = tmp_path / "shared on a forum.png"
    path.write_bytes(every_file["our a1111-png"].read_bytes())
    assert read(path).triggers == ["<cat>"]


@pytest.mark.parametrize("end", ["-neg", "-uc"])
def test_the_negative_file_of_a_pair_is_recognised(tmp_path, end):
    torch.save(a1111_dict(f"cat{end}"), tmp_path / f"cat{end}.pt")
    [concept] = read(tmp_path / f"cat{end}.pt").concepts
    assert (concept.trigger, concept.part) == (f"cat{end}", "negative")


def test_the_layout_of_torch_before_1_6_with_the_source_of_a_class():
    """The original's code with BERT and a word for each image, on torch of its time."""
    found = read(GOLDEN / "original_bert_legacy.pt")
    assert found.format == "original" and len(found.concepts) == 23
    assert found.triggers[:3] == ["*", "א", "ב"] and found.concepts[0].token == 1008
    assert {(concept.encoder, concept.vectors.shape) for concept in found.concepts} == {("bert", (1, 1280))}
    assert found.concepts[0].vectors.norm() > 0


@pytest.mark.parametrize("count", [1, 3])
def test_hcps_file_of_sdxl_has_both_encoders_side_by_side(count, tmp_path):
    both = torch.cat([vectors(count), vectors(count, 1280)], dim=1)
    torch.save({"string_to_param": {"*": both}, "name": "cat"}, tmp_path / "cat.pt")
    found = read(tmp_path / "cat.pt")
    assert found.format == "hcp" and found.triggers == ["cat"]
    assert torch.equal(found.vectors_for(768, "clip_l")["cat"], vectors(count))
    assert torch.equal(found.vectors_for(1280, "clip_g")["cat"], vectors(count, 1280))


def test_words_without_a_token_are_known(tmp_path):
    words = LearnedEmbeddings(
        (
            Concept("*", vectors()),
            Concept("<cat>", vectors(seed=1)),
            Concept("sks", vectors(seed=2), token=48136),
        )
    )
    assert words_without_token(words) == ["<cat>"]
    assert words_without_token(words.with_tokens({"<cat>": 7})) == []
    content = torch.load(write(words, tmp_path / "a.pt", "original"), weights_only=False)
    assert {word: int(token) for word, token in content["string_to_token"].items()} == {
        "*": 265,
        "<cat>": -1,
        "sks": 48136,
    }
