"""A vector per stage and per layer, and the files of the tools of XTI."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.generate import load_embeddings
from ldm.models.diffusion.conditioning import TimedCondition
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import XTI, ProSpect
from ldm.modules.personalization import DenoiserShape
from ldm.util import UserError
from tests.modules.methods.conftest import words


def test_equal_vectors_at_all_stages_and_layers_are_one_vector(model):
    encoder = model.cond_stage_model
    plain = EmbeddingManager(encoder, ["*"], initializer_words=["cat"], num_vectors_per_token=2)
    expected = encoder.encode(["a photo of * in the grass"], embedding_manager=plain)
    ids = encoder.token_ids(["a photo of * in the grass"], plain)
    options = {"placeholder_strings": ["*"], "initializer_words": ["cat"], "num_vectors_per_token": 2}
    staged = ProSpect(encoder, **options).encode(encoder, ids, torch.tensor([333.3]))
    assert torch.equal(staged, expected)
    layered = XTI(encoder, denoiser=model.denoiser_shape, **options).encode(encoder, ids)
    torch.testing.assert_close(layered, expected[:, None, None].expand_as(layered))


@pytest.mark.parametrize(
    ("time", "stage"), [(0, 0), (333.2, 0), (333.4, 1), (666, 1), (667, 2), (999, 2), (1000, 2)]
)
def test_stages(model, time, stage):
    made = words(model, "prospect")
    assert made.stage_of(torch.tensor([time])).tolist() == [stage]
    assert torch.equal(made.rows(torch.tensor([time])).vectors[0, 0], made.word("*").vectors[stage])


def test_rows_of_a_batch_have_their_own_stage(model):
    words(model, "prospect")
    prompts, times = ["a *", "a photo of *", "a *"], torch.tensor([900, 500, 100])
    together = model.get_learned_conditioning(prompts).at(times)
    for row, prompt in enumerate(prompts):
        alone = model.get_learned_conditioning([prompt]).at(times[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[2])


def test_each_stage_is_encoded_once_while_sampling(model, monkeypatch):
    from ldm.generate.images import generate

    made = words(model, "prospect")
    seen = []
    encode = made.encode
    monkeypatch.setattr(
        made, "encode", lambda encoder, ids, times: seen.append(times.tolist()) or encode(encoder, ids, times)
    )
    generate(model, ["a *"] * 2, steps=12, scale=3.0, sampler="ddim")
    assert [len(times) for times in seen] == [1, 1, 1], "two equal prompts, three stages"


def test_layers_reach_their_own_attention(model):
    made = words(model, "xti")
    x, times = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        before = model.apply_model(x, times, model.get_learned_conditioning(["a *"]))
        for name in model.denoiser_shape.layers:
            vectors = made.word("*").get_parameter(name)
            kept = vectors.clone()
            vectors.add_(3.0)
            assert not torch.equal(
                model.apply_model(x, times, model.get_learned_conditioning(["a *"])), before
            )
            vectors.copy_(kept)


def test_a_file_of_the_tools_of_xti(model, tmp_path):
    made = words(model, "xti")
    made.save(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.denoiser_shape.layers)
        tensors = {name: file.get_tensor(name)[0] for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "sks.safetensors")  # [d] and without a record, as other tools write it
    assert load_embeddings(model, tmp_path / "sks.safetensors") == ["sks"]
    assert isinstance(model.embedding_manager, XTI)
    for name in tensors:
        held = model.embedding_manager.word("sks").get_parameter(name)
        assert torch.equal(held, made.word("*").get_parameter(name))
    del tensors["MID"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="learned for another model: its 'MID' is absent"):
        load_embeddings(model, tmp_path / "other.safetensors")


def test_several_words_in_one_file(model, tmp_path):
    made = words(model, "xti", "<a>", "<b>")
    made.save(tmp_path / "two.safetensors")
    assert load_embeddings(model, tmp_path / "two.safetensors") == ["<a>", "<b>"]
    assert torch.equal(model.embedding_manager.word("<b>").MID, made.word("<b>").MID)


@pytest.mark.parametrize("stages", [0, 2.5, True, 1001, "4"])
def test_wrong_numbers_of_stages(model, stages):
    with pytest.raises(UserError, match="stages is"):
        ProSpect(model.cond_stage_model, stages=stages, placeholder_strings=["*"])


def test_a_denoiser_without_layers(model):
    with pytest.raises(UserError, match="XTI needs a denoiser"):
        XTI(model.cond_stage_model, DenoiserShape())


def test_only_a_prompt_with_the_word_depends_on_the_timestep(model):
    words(model, "prospect")
    with torch.no_grad():
        assert isinstance(model.get_learned_conditioning(["a *", "a cat"]), TimedCondition)
        assert isinstance(model.get_learned_conditioning(["a cat"]), torch.Tensor)
