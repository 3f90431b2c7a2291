"""Vectors and residuals for each stage and layer."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.generate import load_embeddings
from ldm.models.diffusion.conditioning import TimedCondition
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods import XTI, Grid, OutputResidual, ProSpect
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


@pytest.mark.parametrize("stages", [0, 2.5, True, 1001, "4"])
def test_wrong_numbers_of_stages(model, stages):
    with pytest.raises(UserError, match="stages is"):
        ProSpect(model.cond_stage_model, stages=stages, placeholder_strings=["*"])


def test_only_a_prompt_with_the_word_depends_on_the_timestep(model):
    words(model, "prospect")
    with torch.no_grad():
        assert isinstance(model.get_learned_conditioning(["a *", "a cat"]), TimedCondition)
        assert isinstance(model.get_learned_conditioning(["a cat"]), torch.Tensor)


def test_only_the_places_of_the_word_change(model):
    made = words(model, "output", num_vectors_per_token=2)
    encoder = model.cond_stage_model
    ids = encoder.token_ids(["a * and a *"], made)
    with_residual = made.encode(encoder, ids)
    made.set_dial("strength", 0)
    changed = (with_residual - made.encode(encoder, ids)).abs().sum(dim=-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == [2, 3, 6, 7]


def test_it_begins_at_the_initializer_and_needs_no_gradient_of_the_encoder(model):
    encoder = model.cond_stage_model
    made = OutputResidual(encoder, placeholder_strings=["*"], initializer_words=["cat"])
    ids = encoder.token_ids(["a photo of *"], made)
    torch.testing.assert_close(made.encode(encoder, ids), encoder.encode(["a photo of cat"]))
    assert [name for name, _ in made.named_parameters()] == ["words.*.residual"]


def test_groups_have_their_names_and_rates(model):
    made = words(model, "output", learn_input=True, residual_rate=1e-3)
    groups = made.parameter_groups()
    assert [(group["name"], group.get("lr")) for group in groups] == [("vectors", None), ("residual", 1e-3)]
    assert [len(group["params"]) for group in groups] == [1, 1]


@pytest.mark.parametrize("options", [{"residual_rate": 0}, {"strength": 3}])
def test_wrong_options_of_a_residual(model, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        OutputResidual(model.cond_stage_model, placeholder_strings=["*"], **options)


def test_residuals_of_all_layers_take_one_pass_of_the_encoder(model, monkeypatch):
    made = words(model, "grid", layers=False, residual_layers=True)
    encoder = model.cond_stage_model
    ids, seen = encoder.token_ids(["a photo of *", "a * in the grass"], made), []
    embed = encoder.embed_ids
    monkeypatch.setattr(encoder, "embed_ids", lambda ids, put: seen.append(len(ids)) or embed(ids, put))
    encoded = made.encode(encoder, ids, torch.tensor([900.0, 20.0]))
    assert seen == [2] and encoded.shape[1:3] == (len(model.denoiser_shape.layers), 1)
    made.set_dial("strength", 0)
    added = encoded - made.encode(encoder, ids, torch.tensor([900.0, 20.0]))
    cells = made.word("*").residual
    torch.testing.assert_close(added[0, :, 0, 4], cells[2, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(added[1, :, 0, 2], cells[0, :, 0], rtol=1e-4, atol=1e-5)


def test_residuals_of_values_alone_leave_the_keys(model, tmp_path):
    made, encoder = words(model, "grid", layers=False, residual_keys=False), model.cond_stage_model
    ids, times = encoder.token_ids(["a photo of *"], made), torch.tensor([900.0])
    keys, values = made.encode(encoder, ids, times).unbind(dim=2)
    plain = words(model, "grid", layers=False, residual_layers=False)
    plain.word("*").vectors.data.copy_(made.word("*").vectors)
    assert torch.equal(keys[:, 0], plain.encode(encoder, ids, times))
    added = (values - keys)[0, :, 4] / keys[0, 0, 4].norm() * 32**0.5
    torch.testing.assert_close(added, made.word("*").residual[2, :, 0], rtol=1e-3, atol=1e-4)
    made.save(tmp_path / "a.safetensors")
    load_embeddings(model, tmp_path / "a.safetensors")
    assert torch.equal(model.embedding_manager.encode(encoder, ids, times)[:, :, 1], values)


def test_stages_and_layers_have_their_own_vectors(model):
    made = words(model, "grid", residual_layers=False)
    rows = made.rows(torch.tensor([10.0, 500.0])).vectors
    assert torch.equal(rows, made.word("*").vectors[:2])
    assert made.rows(None).vectors.shape == (3, len(model.denoiser_shape.layers), 1, 32)
    assert made.dials() == {}


def test_the_cases_of_a_grid_are_its_methods(model):
    encoder, given = model.cond_stage_model, {"placeholder_strings": ["*"], "initializer_words": ["cat"]}
    ids, times = encoder.token_ids(["a *"], words(model, "prospect")), torch.tensor([700.0])
    staged = words(model, "prospect").encode(encoder, ids, times)
    assert torch.equal(
        words(model, "grid", layers=False, residual_layers=False).encode(encoder, ids, times), staged
    )
    plain = Grid(encoder, residual=True, learn_input=False, **given)
    assert not plain.timed and [name for name, _ in plain.named_parameters()] == ["words.*.residual"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_input": False}, "learn_input is false, and so are residual"),
        ({"layers": True}, "Grid needs a denoiser"),
        ({"residual_layers": True}, "Grid needs a denoiser"),
        ({"stages": 0}, "stages is 0"),
    ],
)
def test_wrong_grids(model, options, message):
    with pytest.raises(UserError, match=message):
        Grid(model.cond_stage_model, placeholder_strings=["*"], **options)


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


def test_a_denoiser_without_layers(model):
    with pytest.raises(UserError, match="XTI needs a denoiser"):
        XTI(model.cond_stage_model, DenoiserShape())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prospect", {"residual": True}),
        ("prospect", {"layers": True, "residual_layers": True, "residual_keys": False}),
        ("output", {"stages": 4}),
        ("output", {"residual_keys": False}),
        ("output", {"residual_layers": True, "learn_input": True}),
    ],
)
def test_options_of_a_grid_are_in_the_files_of_its_cases(model, method, options, tmp_path):
    made = words(model, method, **options)
    ids, times = model.cond_stage_model.token_ids(["a *"], made), torch.tensor([700.0])
    before = made.encode(model.cond_stage_model, ids, times)
    made.save(tmp_path / "a.safetensors")
    load_embeddings(model, tmp_path / "a.safetensors")
    again = model.embedding_manager
    assert again is not made and again.options() == made.options()
    assert torch.equal(again.encode(model.cond_stage_model, ids, times), before)
