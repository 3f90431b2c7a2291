"""The residual after the text encoder."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.methods import OutputResidual
from ldm.util import UserError
from tests.modules.methods.conftest import words


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
def test_wrong_options(model, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is"):
        OutputResidual(model.cond_stage_model, placeholder_strings=["*"], **options)
