from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.embeddings import Concept, LearnedEmbeddings, read, write
from ldm.generate import check_mentions, check_prompts, load_embeddings
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.util import UserError
from tests.golden_record import Golden


@pytest.fixture(scope="module")
def weights():
    return Golden("clip_one_vector").model(load_embeddings=False)


@pytest.fixture
def model(weights):
    """The model with a manager as its config would make it: "*" is known and not learned."""
    weights.embedding_manager = EmbeddingManager(weights.cond_stage_model, ["*"], seed=1)
    return weights


def written(tmp_path, name: str, kind: str = "original", width: int = 32, **vectors: float):
    """An embedding file with, for each trigger, two rows of one number."""
    concepts = [Concept(trigger, torch.full((2, width), value)) for trigger, value in vectors.items()]
    path = tmp_path / name
    write(LearnedEmbeddings(tuple(concepts)), path, kind)
    return path


@pytest.mark.parametrize("kind", ["original", "safetensors", "diffusers", "a1111", "onetrainer"])
def test_a_file_of_any_format_replaces_what_the_model_holds(model, tmp_path, kind: str) -> None:
    path = written(tmp_path, "cat.pt", kind, **{"<cat>": 0.5})
    names = load_embeddings(model, path)
    assert len(names) == 1 and model.embedding_manager.placeholders == {names[0]: 2}
    torch.testing.assert_close(model.embedding_manager.export()[names[0]], torch.full((2, 32), 0.5))


def test_loaded_vectors_reach_the_prompt(model, tmp_path) -> None:
    load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))
    cat = model.get_learned_conditioning(["a photo of <cat>"])
    load_embeddings(model, written(tmp_path, "dog.pt", **{"<cat>": -0.5}))
    assert not torch.allclose(cat, model.get_learned_conditioning(["a photo of <cat>"]))


def test_several_files_are_loaded_together(model, tmp_path) -> None:
    paths = [
        written(tmp_path, "cat.pt", **{"<cat>": 0.5}),
        written(tmp_path, "dog.safetensors", "safetensors", **{"<dog>": 0.1}),
        written(tmp_path, "cat-again.pt", **{"<cat>": 0.5}),
    ]
    assert load_embeddings(model, paths) == ["<cat>", "<dog>"]


def test_two_concepts_of_one_name_are_told_apart_by_the_user(model, tmp_path) -> None:
    paths = [written(tmp_path, "cat.pt", **{"*": 0.5}), written(tmp_path, "dog.pt", **{"*": 0.1})]
    with pytest.raises(UserError, match=r"'cat.pt' and 'dog.pt' both have the trigger '\*'.*--rename"):
        load_embeddings(model, paths)


@pytest.mark.parametrize("kind", ["original", "safetensors"])
def test_vectors_of_another_width_are_named(model, tmp_path, kind: str) -> None:
    path = written(tmp_path, "wide.pt", kind, width=768, **{"<cat>": 0.5})
    with pytest.raises(UserError, match=r"wide.pt.*'<cat>'.*768.*width 32") as error:
        load_embeddings(model, path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_is_named(model, tmp_path) -> None:
    (tmp_path / "page.pt").write_text("<html>")
    for name in ("page.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            load_embeddings(model, tmp_path / name)


def test_the_family_of_the_text_encoder_is_looked_at_where_a_file_says_it(tmp_path) -> None:
    bert = Golden("bert_one_vector").model(load_embeddings=False)
    assert load_embeddings(bert, written(tmp_path, "cat.pt", width=64, **{"*": 0.5})) == ["*"]
    concept = Concept("<cat>", torch.ones(1, 64), encoder="clip")
    path = write(LearnedEmbeddings((concept,)), tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match="CLIP text encoder"):
        load_embeddings(bert, path)


def test_a_file_must_say_which_of_two_encoders_of_its_width_it_is_for(tmp_path) -> None:
    """1280 is LDM's BERT and one of SDXL's encoders, and most formats do not tell them apart."""
    taken = {}
    manager = SimpleNamespace(
        width=1280,
        take=lambda vectors, source: taken.update(vectors),
        on_optimizer_step=lambda step: None,
        to=lambda device: None,
        placeholders=taken,
    )
    bert = SimpleNamespace(
        embedding_manager=manager,
        cond_stage_model=BERTEmbedder.__new__(BERTEmbedder),
        alphas_cumprod=torch.ones(1),
    )
    torch.save({"<cat>": torch.ones(1, 1280)}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="SDXL or .*BERT.* does not say which.*--encoder bert"):
        load_embeddings(bert, tmp_path / "learned_embeds.bin")
    told = write(read(tmp_path / "learned_embeds.bin").with_encoder("bert"), tmp_path / "told.safetensors")
    assert load_embeddings(bert, told) == ["<cat>"]


def test_only_vectors_in_use_come_from_a_progressive_file(model, tmp_path) -> None:
    manager = EmbeddingManager(
        model.cond_stage_model,
        ["*"],
        num_vectors_per_token=3,
        progressive_words=True,
        progressive_scale=10,
    )
    manager.on_optimizer_step(15)
    manager.save(tmp_path / "half.pt")
    load_embeddings(model, [tmp_path / "half.pt", written(tmp_path, "cat.pt", **{"<cat>": 0.5})])
    assert model.embedding_manager.placeholders == {"*": 2, "<cat>": 2}


def test_a_progressive_config_uses_all_that_a_file_holds(model, tmp_path) -> None:
    encoder = model.cond_stage_model
    model.embedding_manager = EmbeddingManager(
        encoder, ["*"], num_vectors_per_token=3, progressive_words=True
    )
    load_embeddings(model, written(tmp_path, "cat.safetensors", "safetensors", **{"<cat>": 0.5}))
    assert model.embedding_manager.placeholders == {"<cat>": 2}


def test_a_model_without_manager_is_given_one(model, tmp_path) -> None:
    model.embedding_manager = None
    plain = model.get_learned_conditioning(["a <cat>"])
    assert load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5})) == ["<cat>"]
    assert not torch.allclose(plain, model.get_learned_conditioning(["a <cat>"]))


def test_vectors_go_where_the_model_is(model, tmp_path) -> None:
    model.embedding_manager = None
    model.to("meta")
    load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))
    assert model.embedding_manager.vectors("<cat>").is_meta


def test_a_model_without_text_encoder_says_so(tmp_path) -> None:
    model = nn.Module()
    model.cond_stage_model = nn.Identity()
    with pytest.raises(UserError, match=r"no text encoder that takes embeddings \(Identity\)"):
        load_embeddings(model, written(tmp_path, "cat.pt", **{"<cat>": 0.5}))


def test_a_manager_of_the_users_own_loads_its_own_file(model) -> None:
    class Own(nn.Module):
        placeholders = {"<own>": 1}

        def load(self, path) -> None:
            self.loaded = path

    model.embedding_manager = Own()
    assert load_embeddings(model, "own.bin") == ["<own>"] and model.embedding_manager.loaded == "own.bin"
    with pytest.raises(UserError, match="Own loads one embedding file, not 2"):
        load_embeddings(model, ["a.bin", "b.bin"])


@pytest.mark.parametrize(
    "prompt", ["a photo of *", "*, oil painting", "(<cat>) on <Cat>'s bed", "sky", "disk"]
)
def test_prompts_of_what_is_loaded_pass(prompt: str) -> None:
    check_mentions([prompt], ["*", "<cat>"], ["*", "sk"])


@pytest.mark.parametrize("prompt", ["2*3", "a **bold** dog", "1 < 2 > 0", "5 <3"])
def test_signs_in_other_use_pass(prompt: str) -> None:
    check_mentions([prompt], [])


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of <dog>", "<dog>"),
        ("a photo of *, in oil", r"\*"),
        ("an SK on a beach", "SK"),
        ("sk", "sk"),
    ],
)
def test_a_mention_of_what_is_not_loaded_is_named(prompt: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"mentions '{name}', but no loaded .* \(loaded: '<cat>'\)"):
        check_mentions(["a <cat>", prompt], ["<cat>"], ["sk"])


def test_a_loaded_name_may_hold_another() -> None:
    check_mentions(["a <my *> b", "my *"], ["my", "my *", "<my *>"])
    with pytest.raises(UserError, match=r"loaded: none"):
        check_mentions(["a <my *> b"], [])


def test_a_models_prompts_are_checked_against_what_it_holds(model) -> None:
    check_prompts(model, ["a photo of *"])
    with pytest.raises(UserError, match=r"mentions '\*'"):
        check_prompts(model, ["a photo of *"], learned=[])
    with pytest.raises(UserError, match="mentions '<dog>'"):
        check_prompts(model, ["a photo of <dog>"])
    model.embedding_manager = EmbeddingManager(model.cond_stage_model, ["sculpture"])
    with pytest.raises(UserError, match="mentions 'sculpture'"):
        check_prompts(model, ["a sculpture"], learned=[])
