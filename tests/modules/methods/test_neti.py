"""The network of timestep and layer: where it begins, its dials, and nested dropout."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.embedding_manager import initial_vectors
from ldm.modules.methods import NeTI
from ldm.modules.personalization import DenoiserShape
from ldm.util import UserError
from tests.modules.methods.conftest import words


@pytest.fixture
def neti(model):
    return words(model, "neti")


def test_it_begins_near_the_initializer_and_keeps_its_length(model):
    encoder = model.cond_stage_model
    made = NeTI(
        encoder, placeholder_strings=["*"], initializer_words=["cat"], denoiser=model.denoiser_shape
    ).eval()
    first = initial_vectors(encoder.token_embedding.weight, encoder.prompt_tokenizer.token_ids("cat"), 1, 0)
    vectors = made.rows(torch.tensor([0.0, 499.5, 999.0])).vectors
    assert vectors.shape == (3, len(model.denoiser_shape.layers), 1, 32)
    torch.testing.assert_close(vectors.norm(dim=-1), first.norm().expand(vectors.shape[:-1]))
    assert torch.cosine_similarity(vectors, first, dim=-1).min() > 0.9
    assert made.rows(torch.tensor([0.0])).vectors.std(dim=1).max() > 0, "layers are equal"


def test_the_sizes_of_the_paper_have_half_a_million_parameters(clip_vit_l):
    from ldm.modules.methods.neti import Mapper

    mapper = Mapper(16, 1, 768, 1024, 128)
    assert 450_000 < sum(p.numel() for p in mapper.parameters()) < 650_000


def test_truncation_is_a_dial(neti):
    times = torch.tensor([500.0])
    rows = []
    for kept in (8, 4, 0):
        neti.set_dial("truncation", kept)
        rows.append(neti.rows(times).vectors)
    assert not torch.equal(rows[0], rows[1])
    assert rows[2].std(dim=1).max() < 1e-6, "without units neither layer nor timestep matters"


def test_features_tell_timesteps_and_layers_apart_as_in_the_paper(neti):
    """The likeness of two points is exp(-(0.03 dt)^2 / 2 - (2 dl)^2 / 2) on average over the random angles."""
    from ldm.modules.methods.neti import Mapper

    mapper = Mapper(7, 1, 32, 4096, 8)
    with torch.no_grad():
        mapper.begin(torch.ones(1, 32), 0)
        points = torch.tensor([[500.0, 3.0], [520.0, 3.0], [560.0, 3.0], [500.0, 4.0]])
        encoded = mapper.encoded(points)
    expected = torch.tensor([1.0, 0.6**2 / 2, 1.8**2 / 2, 2.0**2 / 2]).mul(-1).exp()
    expected[0] = 1
    torch.testing.assert_close(encoded @ encoded[0], expected, atol=0.05, rtol=0)
    anchors = mapper.encoded(torch.tensor([[100.0, 0.0]]))
    assert (mapper.likeness(anchors)[0] - mapper.likeness.bias).argmax() == 7, (
        "the second time, the first layer"
    )


def test_each_image_has_its_own_nested_dropout(neti):
    neti.train()
    neti.nested_dropout = 1.0
    vectors = neti.rows(torch.full((6,), 500.0)).vectors
    assert len({tuple(row.flatten().tolist()) for row in vectors}) > 1


def test_the_bypass_is_for_values_only(model, neti):
    ids = model.cond_stage_model.token_ids(["a photo of *"], neti)
    keys, values = neti.encode(model.cond_stage_model, ids, torch.tensor([500])).unbind(dim=2)
    place = 4  # start, a, photo, of
    added = values - keys
    torch.testing.assert_close(added[:, :, place].norm(dim=-1), 0.2 * keys[:, :, place].norm(dim=-1))
    assert not added[:, :, :place].any() and not added[:, :, place + 1 :].any()
    neti.set_dial("bypass", 0)
    assert neti.encode(model.cond_stage_model, ids, torch.tensor([500])).shape[2] == 1


def test_nested_dropout_is_for_training_only_and_follows_the_seed(neti):
    times = torch.tensor([500.0])
    assert torch.equal(neti.rows(times).vectors, neti.rows(times).vectors)
    neti.train()
    seen = []
    for seed in (1, 2, 3, 1):
        torch.manual_seed(seed)
        seen.append(torch.stack([neti.rows(times).vectors for _ in range(6)]))
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1])
    assert len({tuple(row.flatten().tolist()) for row in seen[0]}) > 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("truncation", 9, "truncation is 9; use a whole number from 0 to 8"),
        ("truncation", 1.5, "truncation is 1.5"),
        ("truncation", float("nan"), "truncation is nan; use a whole number"),
        ("truncation", float("-inf"), "truncation is -inf"),
        ("bypass", float("nan"), "bypass is nan"),
        ("bypass", 2, "bypass is 2; use 0 to 1"),
        ("strength", 1, "no dial 'strength' of NeTI; known are: truncation, bypass"),
    ],
)
def test_wrong_dials(neti, name, value, message):
    with pytest.raises(UserError, match=message):
        neti.set_dial(name, value)


def test_a_dial_is_saved(model, neti, tmp_path):
    from ldm.generate import load_embeddings

    neti.set_dial("truncation", 3)
    neti.save(tmp_path / "a.safetensors")
    load_embeddings(model, tmp_path / "a.safetensors")
    assert model.embedding_manager.dials() == {"truncation": 3, "bypass": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested_dropout": 2}, "nested_dropout is 2"),
        ({"bypass": -1}, "bypass is -1"),
        ({"hidden": 0}, "hidden is 0"),
        ({"features": 10**6}, "features is 1000000; use at most 4096"),
        ({"denoiser": DenoiserShape()}, "NeTI needs a denoiser"),
    ],
)
def test_wrong_options(model, options, message):
    given = {"denoiser": model.denoiser_shape, "placeholder_strings": ["*"], **options}
    with pytest.raises(UserError, match=message):
        NeTI(model.cond_stage_model, **given)
