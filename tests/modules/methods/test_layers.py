"""A vector for each layer, and the files of the tools of XTI."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.generate import load_embeddings
from ldm.modules.methods import XTI
from ldm.modules.personalization import DenoiserShape
from ldm.util import UserError
from tests.modules.methods.conftest import words


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
