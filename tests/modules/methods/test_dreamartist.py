"""The negative word beside a word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldm.embeddings import read
from ldm.generate import load_embeddings
from ldm.generate.images import generate
from ldm.models.diffusion.conditioning import GuidedCondition
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import DreamArtist
from ldm.util import UserError


@pytest.fixture
def made(model):
    model.embedding_manager = DreamArtist(
        model.cond_stage_model, ["*"], num_vectors_per_token=2, negative_vectors=3, initializer_words=["cat"]
    )
    return model.embedding_manager


def test_a_training_step_is_guided_and_trains_both(model, made):
    assert made.placeholders == {"*": 2, "*-neg": 3}
    condition = model.training_condition(["a *"])
    assert isinstance(condition, GuidedCondition)
    assert model.negative_prompts(["a *"]) == ["*-neg"]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    expected = [model.apply_model(x, t, model.get_learned_conditioning([text])) for text in ("*-neg", "a *")]
    torch.testing.assert_close(
        model.apply_model(x, t, condition),
        expected[0] + 3 * (expected[1] - expected[0]),
        rtol=1e-3,
        atol=1e-4,
    )
    model.p_losses(x, condition, t)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in made.embedding_parameters())


def test_the_optimizer_step_moves_both(model, made, monkeypatch):
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(world_size=1))
    monkeypatch.setattr(model, "ucg_rate", 0.0)
    before = {word: made.vectors(word).detach().clone() for word in made.placeholders}
    optimizer = torch.optim.SGD(made.embedding_parameters(), lr=1.0)
    model.train()
    model(torch.randn(1, 4, 8, 8), ["a *"])[0].backward()
    model.on_before_optimizer_step(optimizer)
    optimizer.step()
    assert {word for word, value in before.items() if not torch.equal(value, made.vectors(word))} == {
        "*",
        "*-neg",
    }


def test_its_files_are_ordinary_and_the_negative_joins_wherever_both_are_held(model, made, tmp_path):
    made.save(tmp_path / "both.pt")
    assert read(tmp_path / "both.pt").triggers == ["*", "*-neg"]
    model.embedding_manager = EmbeddingManager(model.cond_stage_model, ["*"])
    load_embeddings(model, tmp_path / "both.pt")
    assert model.negative_prompts(["a *", "a cat"], "dog") == ["dog *-neg", "dog"]
    assert model.negative_prompts(["a *"], "*-neg") == ["*-neg"]
    options = {"steps": 1, "scale": 3.0}
    first = generate(model, ["a *"], **options)[0].tobytes()
    assert first == generate(model, ["a *"], negative_prompt="*-neg", **options)[0].tobytes()


def test_another_word_begins_from_both(model, made, tmp_path):
    made.save(tmp_path / "both.pt")
    DreamArtist.check_file(tmp_path / "both.pt", ["<cat>"])
    path = str(tmp_path / "both.pt")
    again = DreamArtist(model.cond_stage_model, ["<cat>"], embedding_manager_ckpt=path)
    assert again.placeholders == {"<cat>": 2, "<cat>-neg": 3}
    for word in ("*", "*-neg"):
        assert torch.equal(again.vectors(word.replace("*", "<cat>")), made.vectors(word))
    alone = EmbeddingManager(model.cond_stage_model, ["*-neg"], embedding_manager_ckpt=path)
    assert torch.equal(alone.vectors("*-neg"), made.vectors("*-neg")), "a word of the file by its name"


def test_groups(made):
    assert [(group["name"], len(group["params"])) for group in made.parameter_groups()] == [
        ("words", 1),
        ("negatives", 1),
    ]


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"negative_vectors": 0}, {"negative_rate": 0}])
def test_wrong_options(model, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        DreamArtist(model.cond_stage_model, ["*"], **options)


def test_wrong_words(model):
    with pytest.raises(UserError, match="'a-neg' is the name of a negative"):
        DreamArtist(model.cond_stage_model, ["a-neg"])
    with pytest.raises(UserError, match="has 3 entries for 2 placeholder_strings"):
        DreamArtist(model.cond_stage_model, ["<a>", "<b>"], num_vectors_per_token=[1, 2, 3])
    counted = DreamArtist(model.cond_stage_model, ["<a>", "<b>"], num_vectors_per_token=[1, 2])
    assert counted.placeholders == {"<a>": 1, "<b>": 2, "<a>-neg": 3, "<b>-neg": 3}
