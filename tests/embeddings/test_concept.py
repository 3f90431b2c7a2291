from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Metadata, Progress, encoder_kind
from ldm.embeddings.concept import ENCODER_KINDS, architecture_of, kind_of_architecture, model_names
from tests.embeddings.samples import learned, progressive, vectors


def test_vectors_are_copied_to_float32():
    table = torch.nn.Parameter(torch.ones(10, 8, dtype=torch.bfloat16))
    concept = Concept("x", table[2])
    assert concept.vectors.shape == (1, 8) and concept.vectors.dtype == torch.float32
    assert not concept.vectors.requires_grad and concept.vectors.untyped_storage().nbytes() == 32
    whole = torch.ones(2, 8)
    concept = Concept("x", whole)
    whole.zero_()
    assert concept.vectors.sum() == 16


def test_concepts_and_embeddings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        learned().concepts[0].trigger = "y"
    with pytest.raises(dataclasses.FrozenInstanceError):
        learned().concepts = ()


def test_the_same_trigger_twice_is_refused():
    with pytest.raises(EmbeddingError, match="'x' occurs twice"):
        LearnedEmbeddings((Concept("x", vectors()), Concept("x", vectors(seed=1))))


@pytest.mark.parametrize(
    ("family", "width", "kind"),
    [
        ("clip", 768, "clip_l"),
        ("clip", 1024, "clip_h"),
        ("clip", 1280, "clip_g"),
        ("clip", 128, "clip"),
        ("bert", 1280, "bert"),
        ("bert", 640, "bert"),
        ("clip_g", 1280, "clip_g"),
    ],
)
def test_encoder_kind_by_family_and_width(family, width, kind):
    assert encoder_kind(family, width) == kind
    assert kind_of_architecture(architecture_of(kind, width), width) == kind


def test_names_of_the_models_of_every_kind():
    for name, kind in ENCODER_KINDS.items():
        assert model_names(name, kind.width) == kind.models
    assert " or " in model_names(None, 1280)
    assert model_names(None, 128) == "a model whose text encoder has width 128"
    assert model_names("clip", 128) == "a model whose CLIP text encoder has width 128"


def test_a_width_that_does_not_fit_the_encoder_is_refused():
    with pytest.raises(EmbeddingError, match="width 768 do not fit the encoder 'clip_g'"):
        Concept("x", vectors(), "clip_g")
    with pytest.raises(EmbeddingError, match="encoder 'nonsense'"):
        learned().with_encoder("nonsense")


def test_vectors_for_a_model():
    found = dataclasses.replace(learned("<cat>"), source="cat.pt")
    assert list(found.vectors_for(768, "clip")) == ["<cat>"] == list(found.vectors_for(768))
    with pytest.raises(
        EmbeddingError, match=r"'cat.pt': '<cat>' \(width 768\) is for Stable Diffusion 1.*has width 1280"
    ):
        found.vectors_for(1280, "bert")
    bert = learned(width=1280)
    with pytest.raises(EmbeddingError, match="BERT.*has width 1280, the second encoder of SDXL"):
        bert.vectors_for(1280, "clip")


def test_only_and_renamed():
    found = learned("<cat>")
    assert found.renamed({"<cat>": "<dog>"}).triggers == ["<dog>"]
    with pytest.raises(EmbeddingError, match="no trigger 'x'; there is '<cat>'"):
        found.only("x")
    with pytest.raises(EmbeddingError, match="no trigger 'x'"):
        found.renamed({"x": "y"})


def test_progress_gives_the_number_of_vectors_in_use():
    assert [Progress(step, 100).in_use(4) for step in (0, 99, 100, 299, 300, 10**6)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("step", "scale"),
    [
        (-1, 100),
        (5, 0),
        (5, -3),
        (True, 100),
        (5, True),
        (2**80, 1),
        (5, 2**80),
        (5.0, 100),
        (5, None),
        ("5", 1),
    ],
)
def test_impossible_progress_is_refused(step, scale):
    assert Progress.from_values(step, scale) is None
    with pytest.raises(EmbeddingError, match="the progress has the (step|scale)") as error:
        Progress(step, scale)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("unused", "match"),
    [
        (vectors(1, 8), "768 for vectors in use and 8 for those not in use"),
        (torch.full((1, 768), float("nan")), "not in use, contains NaN"),
        (torch.zeros(0, 768), "shape"),
        ([1.0], "not a tensor"),
        (vectors(1023), "is 1025 x 768; at most 1024"),
    ],
)
def test_unused_vectors_are_checked_like_those_in_use(unused, match):
    with pytest.raises(EmbeddingError, match=match):
        Concept("x", vectors(), unused=unused)


def test_unused_vectors_and_progress_must_agree():
    concept = Concept("x", vectors(2), unused=vectors(2, seed=1))
    LearnedEmbeddings((concept,), progress=Progress(150, 100))
    for progress in (None, Progress(50, 100), Progress(250, 100)):
        with pytest.raises(EmbeddingError, match="'x': 2 of 4 vectors are in use"):
            LearnedEmbeddings((concept,), progress=progress)
    with pytest.raises(EmbeddingError, match="'x': 3 of 3 vectors are in use"):
        LearnedEmbeddings((Concept("x", vectors(3)),), progress=Progress(150, 100))


def test_renamed_and_selected_concepts_keep_unused_vectors_and_progress():
    start = progressive("x")
    for found in (start.renamed({"x": "y"}), start.only("x"), start.with_encoder("clip")):
        assert found.progress == Progress(150, 100)
        assert torch.equal(found.concepts[0].unused, vectors(4)[2:])
    plain = start.without_progress()
    assert plain.progress is None and plain.concepts[0].unused is None
    assert torch.equal(plain.concepts[0].vectors, vectors(4)[:2])


def test_metadata_drops_values_of_wrong_types():
    values = {
        "steps": "500",
        "seed": 2**80,
        "learning_rate": "5e-3",
        "images": 5.0,
        "tool": "  a\tb ",
        "resolution": True,
        "initializer": 7,
        "date": "x" * 9999,
        "base_model": "",
    }
    metadata = Metadata.from_values(values)
    assert metadata == Metadata(
        steps=500, learning_rate=5e-3, images=5, tool="a b", date="x" * 800, seed=metadata.seed
    )
    assert Metadata.from_values({}) == Metadata() and Metadata().known() == {}
