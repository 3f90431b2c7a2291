"""The context regularisation."""

from __future__ import annotations

import pytest
import torch

from ldm.modules import methods
from ldm.modules.methods import METHODS, CoRe
from ldm.modules.methods.core import PROMPTS
from ldm.prompts import OBJECT_TEMPLATES
from ldm.util import UserError
from tests.golden_record import Golden


def core(model, **options):
    given = {"placeholder_strings": ["*"], "initializer_words": ["cat"], **options}
    return CoRe(model.cond_stage_model, **given)


@pytest.mark.parametrize("count", [1, 3])
def test_the_initializer_itself_costs_nothing_and_any_other_vector_does(model, count):
    made, encoder = core(model, num_vectors_per_token=count), model.cond_stage_model
    if count == 1:
        assert float(made.context_loss(encoder).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        made.vectors("*").add_(torch.randn(count, 32, generator=torch.Generator().manual_seed(0)))
    loss = made.context_loss(encoder)
    assert float(loss.detach()) > 0
    loss.backward()
    assert made.vectors("*").grad.abs().sum() > 0


def test_the_longest_prompt_that_leaves_room(model):
    made = core(model, num_vectors_per_token=75, prompts=["{}"])
    assert made.context_loss(model.cond_stage_model).isfinite()
    with_images = core(model, per_image_tokens=True)
    assert with_images.context_loss(model.cond_stage_model).isfinite()


def test_words_before_it_count_where_the_encoder_sees_the_whole_prompt():
    model = Golden("bert_one_vector").model(load_embeddings=False)
    made = core(model, prompts=["a photo of a {}"])
    with torch.no_grad():
        made.vectors("*").add_(1.0)
    encoder = model.cond_stage_model
    ours, theirs = (
        encoder.encode([text], embedding_manager=made)[0] for text in ("a photo of a *", "a photo of a cat")
    )
    # All but the word itself, and nothing of the padding; "cat" has three tokens here.
    distances = 1 - torch.cosine_similarity(ours[[0, 1, 2, 3, 4, 6]], theirs[[0, 1, 2, 3, 4, 8]], dim=-1)
    torch.testing.assert_close(made.context_loss(encoder), 0.05 * distances.mean())


@pytest.mark.parametrize("target", ["CoReGrid", "CoReNeTI"])
def test_words_of_other_methods_are_regularised_too(model, target):
    encoder, options = model.cond_stage_model, {"bypass": 0.2, "features": 16, "hidden": 8}
    if target == "CoReGrid":
        options = {"stages": 3, "layers": True, "residual_layers": True}
    made = getattr(methods, target)(
        encoder,
        placeholder_strings=["*"],
        initializer_words=["cat"],
        denoiser=model.denoiser_shape,
        **options,
    )
    assert made.adds_loss and METHODS[made.method] in type(made).__mro__
    if target == "CoReGrid":
        assert float(made.context_loss(encoder).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in made.embedding_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    loss = made.context_loss(encoder)
    loss.backward()
    assert (
        float(loss.detach()) > 0
        and sum(p.grad.abs().sum() for p in made.embedding_parameters() if p.grad is not None) > 0
    )


def test_it_joins_the_loss_of_training_steps_only(model):
    model.embedding_manager = made = core(model, context_weight=100.0)
    with torch.no_grad():
        made.vectors("*").add_(1.0)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    cond = model.get_learned_conditioning(["a *"])
    assert "val/loss_context" not in model.p_losses(x, cond, t)[1]
    loss, parts = model.train().p_losses(x, cond, t)
    torch.testing.assert_close(loss.detach(), parts["train/loss"] + parts["train/loss_context"])


def test_its_prompts_are_no_templates():
    assert not {*PROMPTS} & {*OBJECT_TEMPLATES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initializer_words": []}, "initializer_words has none for '\\*', and CoRe"),
        ({"context_weight": -1}, "context_weight is -1"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0"),
        ({"prompts": ["a photo"]}, "prompts holds 'a photo', which has no {}"),
        (
            {"num_vectors_per_token": 75, "prompts": ["a {}"]},
            "75 vectors of '\\*' fill the prompt 'a {}'",
        ),
        ({"prompts": ["a " * 76 + "{}"]}, "1 vectors of"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(UserError, match=message):
        core(model, **options)
