"""The embedding manager: insertion, options, initial vectors, norm control, progressive words."""

from __future__ import annotations

import logging

import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.personalization import DenoiserShape
from ldm.modules.prompt_tokenizer import place_after_insertion
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.util import ConfigError, UserError, accepts, get_obj_from_str, instantiate_from_config
from tests.golden_record import CASES, GOLDEN, Golden
from tests.modules.conftest import build_encoder, manager_of

PERSONALIZATIONS = GOLDEN.parents[1] / "configs" / "personalization"


def put(manager: EmbeddingManager, ids: list[int], length: int) -> list[float]:
    """Which vector each place of a prompt shows: token k is embedded as -k, row r of a placeholder as itself."""
    tokens = torch.tensor([ids + [0] * (length - len(ids))])
    embedded = -tokens[..., None].float().expand(-1, -1, manager.width)
    return manager(tokens, embedded)[0, :, 0].tolist()


def number_vectors(manager: EmbeddingManager, **first: float) -> None:
    for string, start in first.items():
        vectors = manager.vectors(string)
        vectors.data = (start + torch.arange(float(len(vectors))))[:, None].expand_as(vectors).clone()


# -- the original's numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_conditioning_is_the_originals(case):
    golden = Golden(case)
    encoder = build_encoder(case)
    node = OmegaConf.to_container(golden.config().params.personalization_config)
    manager = instantiate_from_config(node, embedder=encoder)
    manager.load(golden.embeddings)
    assert torch.equal(manager.vectors("*"), golden.io["param/*"])
    assert torch.equal(encoder.token_ids(golden.meta["prompts"], manager), golden.io["tokens"])
    for name, used in (("conditioning", manager), ("conditioning_plain", None)):
        expected = golden.io[name]
        result = encoder(golden.meta["prompts"], embedding_manager=used)
        assert (result - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_state_dict_names_are_the_originals(clip):
    manager = manager_of(clip, "*", "@", initializer_words=["sculpture"], num_vectors_per_token=2)
    assert {key: tuple(value.shape) for key, value in manager.state_dict().items()} == {
        "string_to_param_dict.*": (2, 32),
        "string_to_param_dict.@": (2, 32),
        "initial_embeddings.*": (2, 32),
    }


# -- insertion ----------------------------------------------------------------------------------------------


def test_vectors_push_what_follows_to_the_right_and_off_the_end(clip):
    manager = manager_of(clip, "*", "@", num_vectors_per_token={"*": 3, "@": 2})
    number_vectors(manager, **{"*": 100, "@": 200})
    star, at = (int(token) for token in manager.string_to_token_dict.values())
    assert put(manager, [1, star, 2, at, 3], 9) == [-1, 100, 101, 102, -2, 200, 201, -3, 0]
    assert put(manager, [star, star, at], 7) == [100, 101, 102, 100, 101, 102, 200]
    assert put(manager, [1, 2, 3], 3) == [-1, -2, -3]
    assert put(manager, [1, 2, star], 3) == [-1, -2, 100]
    assert put(manager, [at, 5, 6, star], 4) == [200, 201, -5, -6]


def test_the_place_of_a_token_moves_by_the_vectors_before_it_alone():
    tokens = torch.tensor([[1, 9, 5, 9, 8, 2]]).repeat(6, 1)
    places = place_after_insertion(tokens, torch.arange(6), {9: 3, 8: 2})
    assert places.tolist() == [0, 1, 4, 5, 8, 10]


def test_inputs_are_not_changed_and_gradients_reach_only_the_vectors_shown():
    encoder = build_encoder("clip_one_vector")
    manager = manager_of(encoder, "*", "@", num_vectors_per_token=2)
    ids = encoder.token_ids(["a photo of *", "* " + "a " * 74, "a " * 74 + "*"], manager)
    embedded = encoder.token_embedding(ids)
    before = ids.clone(), embedded.clone()
    manager(ids, embedded)
    assert torch.equal(ids, before[0]) and torch.equal(embedded, before[1])

    encoder("a photo of *", embedding_manager=manager).square().sum().backward()
    assert (manager.vectors("*").grad.abs().sum(dim=1) > 0).all()
    assert not manager.vectors("@").grad.any()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert list(manager.embedding_parameters()) == [manager.vectors("*"), manager.vectors("@")]


def test_nothing_is_read_back_from_the_device(clip):
    """A tensor on the meta device has no values to read."""
    manager = manager_of(clip, "*", "@", num_vectors_per_token=2).to("meta")
    tokens, embedded = (
        torch.zeros(2, 77, dtype=torch.long, device="meta"),
        torch.zeros(2, 77, 32, device="meta"),
    )
    assert manager(tokens, embedded).shape == (2, 77, 32)
    with pytest.raises(RuntimeError, match="meta"):
        (tokens == 265).any().item()


def test_the_embeddings_keep_their_dtype(clip):
    manager = manager_of(clip, "*")
    embedded = torch.zeros(1, 3, 32, dtype=torch.bfloat16)
    assert manager(torch.tensor([[1, 265, 2]]), embedded).dtype == torch.bfloat16


def test_a_manager_without_placeholders_changes_nothing(clip):
    manager = EmbeddingManager(clip)
    assert torch.equal(clip("a dog", embedding_manager=manager), clip("a dog"))
    assert manager.get_embedding_norms_squared().shape == (0,)
    manager.load(Golden("clip_one_vector").embeddings)
    assert manager.placeholders == {"*": 1}


@pytest.mark.parametrize(
    "string", ["<my-cat>", "my.cat v1.5", "[x]", "猫", "train", "keys", "_parameters", "a cat"]
)
def test_any_string_is_learned_saved_and_loaded(encoder, string, tmp_path):
    manager = manager_of(encoder, string, num_vectors_per_token=2)
    assert not torch.allclose(
        encoder(f"a photo of {string}, nice", manager), encoder(f"a photo of {string}, nice")
    )
    manager.save(tmp_path / "e.pt")
    other = manager_of(encoder, "*")
    other.load(tmp_path / "e.pt")
    assert other.placeholders == {string: 2}
    assert torch.equal(other.vectors(string), manager.vectors(string))
    assert torch.equal(encoder(f"({string})", other), encoder(f"({string})", manager))
    third = manager_of(encoder, string, num_vectors_per_token=2, seed=9)
    third.load_state_dict(manager.state_dict())
    assert torch.equal(third.vectors(string), manager.vectors(string))


# -- options ------------------------------------------------------------------------------------------------


def test_an_ordinary_word_is_allowed_with_a_warning(clip, caplog):
    with caplog.at_level(logging.WARNING):
        manager_of(clip, "dog", "*", "<cat>")
    assert [record.getMessage() for record in caplog.records if "ordinary word" in record.getMessage()] == [
        "placeholder 'dog' is an ordinary word, and prompts lose its ordinary meaning"
    ]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(2, {"*": 2, "@": 2}), ([1, 3], {"*": 1, "@": 3}), ({"@": 4}, {"*": 1, "@": 4})],
)
def test_vectors_are_counted_for_each_placeholder(clip, wanted, expected):
    for value in (wanted, wanted if isinstance(wanted, int) else OmegaConf.create(wanted)):
        assert manager_of(clip, "*", "@", num_vectors_per_token=value).placeholders == expected


def test_per_image_tokens_add_twenty_two_placeholders(bert):
    strings = OmegaConf.create(["*"])
    manager = EmbeddingManager(
        bert, placeholder_strings=strings, per_image_tokens=True, num_vectors_per_token=[2]
    )
    assert list(manager.placeholders.items())[:2] == [("*", 2), ("א", 1)]
    assert len(manager.placeholders) == 23 and strings == ["*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placeholder_strings": ["*", "*"]}, "placeholder '\\*' is there twice"),
        ({"placeholder_strings": ["Cat", "cat"]}, "placeholder 'cat' is there twice, first as 'Cat'"),
        ({"placeholder_strings": ["א"], "per_image_tokens": True}, "placeholder 'א' is there twice"),
        ({"placeholder_strings": [""]}, "placeholder '' is empty"),
        ({"placeholder_strings": ["a "]}, "begins or ends in a space"),
        ({"placeholder_strings": [7]}, "placeholder 7 is not a text"),
        ({"placeholder_strings": ["*"], "initializer_words": ["a", "b"]}, "2 initializer_words for 1"),
        ({"placeholder_strings": ["*"], "initializer_words": [" "]}, "initializer word ' ' has no tokens"),
        ({"placeholder_strings": ["*"], "num_vectors_per_token": 0}, "'\\*' is 0; use a number from 1 to 75"),
        ({"placeholder_strings": ["*"], "num_vectors_per_token": 76}, "is 76; use a number from 1 to 75"),
        (
            {"placeholder_strings": ["*"], "num_vectors_per_token": [1, 2]},
            "2 entries for 1 placeholder_strings",
        ),
        (
            {"placeholder_strings": ["*"], "num_vectors_per_token": {"@": 2}},
            "names '@', which is no placeholder",
        ),
        ({"placeholder_strings": ["*"], "progressive_scale": 0}, "progressive_scale is 0"),
    ],
)
def test_what_does_not_fit_is_one_line(clip, options, message):
    with pytest.raises(UserError, match=message) as caught:
        EmbeddingManager(clip, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(PERSONALIZATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_personalization_yamls_build_what_they_say(bert, path):
    node = OmegaConf.load(path).model.params.personalization_config
    given = {"denoiser": DenoiserShape(("IN01", "MID")), "initializer_words": ["sculpture"]}
    given = {key: value for key, value in given.items() if accepts(get_obj_from_str(node.target), key)}
    manager = instantiate_from_config(
        node, embedder=bert, **({} if "initializer_words" in node.params else given)
    )
    expected = {
        "one_vector": {"*": 1},
        "three_vectors": {"*": 3},
        "progressive": {"*": 1},
        "per_image_tokens": dict.fromkeys(["*", *PER_IMAGE_TOKENS], 1),
        "two_concepts": {"*": 1, "@": 1},
        "core": {"*": 8},
        "core_masked": {"*": 8},
        "prospect_core": {"*": 2},
        "cross_init": {"*": 2},
        "dreamartist": {"*": 3, "*-neg": 3},
    }
    assert manager.placeholders == expected.get(path.stem, {"*": 1})


def test_unknown_options_are_errors(clip):
    node = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": {"num_vector_per_token": 2}}
    with pytest.raises(ConfigError, match="unknown key 'num_vector_per_token'"):
        instantiate_from_config(node, embedder=clip)


# -- progressive words --------------------------------------------------------------------------------------


def test_progressive_words_count_optimizer_steps_and_are_the_same_after_loading(clip, tmp_path):
    manager = manager_of(clip, "*", num_vectors_per_token=3, progressive_words=True, progressive_scale=10)
    number_vectors(manager, **{"*": 100})
    shown = []
    for step in (0, 9, 10, 15, 20, 1000):
        for _ in range(3):  # passes without an optimizer step count for nothing
            put(manager, [265], 4)
        manager.on_optimizer_step(step)
        shown.append((manager.placeholders["*"], put(manager, [265, 7], 4)))
        if step == 15:
            manager.save(tmp_path / "e.pt")
            state = manager.state_dict()
    assert shown[1] == (1, [100, -7, 0, 0])
    assert shown[2] == shown[3] == (2, [100, 101, -7, 0])
    assert [count for count, _ in shown] == [1, 1, 2, 2, 3, 3]

    plain = manager_of(clip, "*")
    plain.load(tmp_path / "e.pt")
    assert put(plain, [265, 7], 4) == shown[3][1]
    assert len(plain.vectors("*")) == 3 and plain.export()["*"].shape == (2, 32)
    plain.on_optimizer_step(20)
    assert plain.placeholders == {"*": 3}

    resumed = manager_of(clip, "*", num_vectors_per_token=3, progressive_words=True, progressive_scale=10)
    put(resumed, [265, 7], 4)
    resumed.load_state_dict(state)
    assert put(resumed, [265, 7], 4) == shown[3][1]


def test_progressive_vectors_of_several_placeholders_are_their_own(clip):
    manager = manager_of(
        clip, "*", "@", num_vectors_per_token=[3, 2], progressive_words=True, progressive_scale=10
    )
    number_vectors(manager, **{"*": 100, "@": 200})
    star, at = (int(token) for token in manager.string_to_token_dict.values())
    assert put(manager, [at, star], 6) == [200, 100, 0, 0, 0, 0]
    manager.on_optimizer_step(20)
    assert put(manager, [at, star], 6) == [200, 201, 100, 101, 102, 0]


def test_all_vectors_of_an_original_file_are_in_use_with_progressive_words(clip):
    manager = manager_of(clip, "*", num_vectors_per_token=3, progressive_words=True)
    manager.load(Golden("clip_three_vectors").embeddings)
    manager.on_optimizer_step(1)
    assert manager.placeholders == {"*": 3}


# -- figures ------------------------------------------------------------------------------------------------


def test_norms_and_the_distance_to_the_initial_vectors(clip):
    manager = manager_of(
        clip, "*", "@", "?", initializer_words=["dog", "photo"], num_vectors_per_token=[1, 2, 1]
    )
    assert torch.allclose(
        manager.get_embedding_norms_squared(),
        torch.cat([manager.vectors(string) for string in "*@?"]).norm(dim=1) ** 2,
    )
    with torch.no_grad():
        manager.vectors("*")[0, 0] += 2.0  # squared distance 4
        manager.vectors("@")[1, 0] += 4.0  # 16, and 0 for its other vector
        manager.vectors("?").add_(1)  # has no initializer
    loss = manager.embedding_to_coarse_loss()
    assert loss.item() == pytest.approx((4 + 8) / 2, rel=1e-5)
    loss.backward()
    assert manager.vectors("*").grad[0, 0] == pytest.approx(2.0)
    assert manager_of(clip, "*").embedding_to_coarse_loss() == 0


def test_cross_initialization_is_held_by_the_distance_itself(clip):
    manager = manager_of(clip, "*", initializer_words=["cat"], cross_init=True)
    manager.embedding_to_coarse_loss().backward()
    assert not manager.vectors("*").grad.any(), "where it begins"
    with torch.no_grad():
        manager.vectors("*")[0, 0] += 3.0
    assert manager.embedding_to_coarse_loss().item() == pytest.approx(3.0)


# -- What vectors are before they are trained --


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


def manager(clip, kind: str | None, **options) -> EmbeddingManager:
    return EmbeddingManager(clip, ["*"], ["cat"], num_vectors_per_token=3, norm_control=kind, **options)


def norms(held: EmbeddingManager) -> torch.Tensor:
    return held.vectors("*").detach().norm(dim=1)


def usual(clip) -> float:
    return float(clip.token_embedding.weight.detach().norm(dim=1).mean())


def test_fixed_keeps_the_vocabularys_mean_norm_and_the_direction(clip) -> None:
    held = manager(clip, "fixed")
    assert norms(held).tolist() == pytest.approx([usual(clip)] * 3, rel=1e-5), "from the beginning"
    torch.testing.assert_close(held.initial("*"), held.vectors("*").detach())
    before = held.vectors("*").detach().clone()
    parameter = held.vectors("*")
    with torch.no_grad():
        parameter *= torch.tensor([[50.0], [0.1], [1.0]])
    held.on_optimizer_step(1)
    assert held.vectors("*") is parameter, "the optimiser goes on with the same parameter"
    torch.testing.assert_close(parameter.detach(), before, rtol=1e-5, atol=1e-6)


def test_limited_cuts_only_what_is_longer(clip) -> None:
    held = manager(clip, "limited", norm_ratio=2.0)
    vectors = held.vectors("*")
    with torch.no_grad():
        vectors.copy_(torch.nn.functional.normalize(vectors, dim=1) * torch.tensor([[50.0], [0.1], [0.0]]))
    held.on_optimizer_step(1)
    assert norms(held).tolist() == pytest.approx([2 * usual(clip), 0.1, 0.0], rel=1e-5)


def test_off_it_touches_nothing(clip) -> None:
    plain, off = EmbeddingManager(clip, ["*"], ["cat"], num_vectors_per_token=3), manager(clip, None)
    assert torch.equal(plain.vectors("*"), off.vectors("*"))
    with torch.no_grad():
        off.vectors("*").mul_(50)
    before = off.vectors("*").detach().clone()
    off.on_optimizer_step(1)
    assert torch.equal(off.vectors("*"), before)


def test_it_is_measured_anew_where_vectors_came_with_the_weights(clip) -> None:
    held = manager(clip, "fixed")

    class Other:
        token_embedding = torch.nn.Embedding(4, 32, _weight=torch.ones(4, 32))

    held.measure(Other)
    held.on_optimizer_step(1)
    assert norms(held).tolist() == pytest.approx([32**0.5] * 3, rel=1e-5)


def test_nonsense(clip) -> None:
    with pytest.raises(UserError, match="norm_control is 'sphere'; use fixed"):
        manager(clip, "sphere")
    with pytest.raises(UserError, match="norm_ratio is 0"):
        manager(clip, "fixed", norm_ratio=0)
