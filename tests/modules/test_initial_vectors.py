"""What vectors are before they are trained."""

from __future__ import annotations

import torch

from tests.golden_record import Golden
from tests.modules.conftest import build_encoder, manager_of


def test_an_initializer_is_the_token_embedding_alone(clip):
    manager = manager_of(clip, "*", initializer_words=["sculpture"])
    (token,) = clip.prompt_tokenizer.token_ids("sculpture")
    assert torch.equal(manager.vectors("*")[0], clip.token_embedding.weight[token])


def test_several_initializer_tokens_are_spread_and_repeats_differ_a_little(clip):
    tokens = clip.prompt_tokenizer.token_ids("photo of dog")
    table = clip.token_embedding.weight
    manager = manager_of(clip, "*", initializer_words=["photo of dog"], num_vectors_per_token=6)
    vectors = manager.vectors("*")
    assert torch.equal(vectors[::2], table[tokens])
    moved = (vectors[1::2] - table[tokens]).std() / table.std()
    assert 0.05 < moved < 0.2
    assert len(vectors.unique(dim=0)) == 6


def test_without_initializer_vectors_look_like_the_vocabulary(clip):
    manager = manager_of(clip, "*", "@", initializer_words=["", None], num_vectors_per_token=60)
    table = clip.token_embedding.weight
    vectors = torch.cat(list(manager.embedding_parameters()))
    assert (vectors.mean() - table.mean()).abs() < 0.2 * table.std()
    assert 0.9 < vectors.std() / table.std() < 1.1
    assert not torch.equal(manager.vectors("*"), manager.vectors("@"))


def test_draws_follow_the_seed_and_leave_the_global_generator_alone(clip):
    state = torch.get_rng_state()
    first, same, other = (manager_of(clip, "*", seed=seed).export()["*"] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_reset_follows_weights_that_come_later_but_keeps_those_of_a_file():
    encoder = build_encoder("clip_one_vector")
    drawn = manager_of(encoder, "*", initializer_words=["dog"])
    file = Golden("clip_one_vector").embeddings
    loaded = manager_of(encoder, "*", initializer_words=["dog"], embedding_manager_ckpt=file)
    with torch.no_grad():
        encoder.token_embedding.weight.add_(1)
    drawn.reset(encoder)
    loaded.reset(encoder)
    assert torch.equal(drawn.vectors("*")[0], encoder.token_embedding.weight[1929])
    assert torch.equal(drawn.initial_embeddings.get_buffer("*"), drawn.vectors("*"))
    assert torch.equal(loaded.vectors("*"), Golden("clip_one_vector").io["param/*"])
    assert torch.equal(loaded.initial("*")[0], encoder.token_embedding.weight[1929])


def test_it_is_built_on_the_meta_device():
    with torch.device("meta"):
        encoder = build_encoder("clip_one_vector")
        manager = manager_of(encoder, "*", initializer_words=["photo of dog"], num_vectors_per_token=2)
    assert manager.vectors("*").is_meta and manager.vectors("*").shape == (2, 32)
