"""OpenCLIP's text tower against numbers recorded from open_clip."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.modules.personalization import TextEncoder
from ldm.util import ConfigError, UserError, skip_pretrained
from tests.golden_record import GOLDEN, Golden, fill

GOLDEN_SD2 = Golden("sd2_tiny")
TINY = {"width": 32, "heads": 4, "layers": 3}
TOKENIZER = str(GOLDEN / "clip_tiny")


def build(**options) -> FrozenOpenCLIPEmbedder:
    with skip_pretrained():
        encoder = FrozenOpenCLIPEmbedder(**{"arch": TINY, "tokenizer": TOKENIZER} | options)
    return fill(encoder, "cond_stage_model.")


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_hidden_states_are_those_of_open_clip(layer):
    encoder = build(layer=layer)
    assert torch.equal(encoder.token_ids(GOLDEN_SD2.meta["prompts"]), GOLDEN_SD2.io["tokens"])
    expected = GOLDEN_SD2.io[layer]
    result = encoder(GOLDEN_SD2.meta["prompts"])
    assert (result - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_names_and_shapes_are_those_of_stable_diffusion_2():
    with torch.device("meta"), skip_pretrained():
        encoder = FrozenOpenCLIPEmbedder(tokenizer=TOKENIZER, layer="penultimate", device="cuda")
    manifest = json.loads((GOLDEN / "sd_v2.state_dict.json").read_text())
    prefix = "cond_stage_model."
    expected = {k.removeprefix(prefix): tuple(v) for k, v in manifest.items() if k.startswith(prefix)}
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == expected


def test_a_manager_changes_token_embeddings_before_positions_are_added():
    encoder = build()
    assert isinstance(encoder, TextEncoder)
    ids = encoder.token_ids("a dog")
    ids[0, 1] = 49408  # a placeholder without a token of its own
    seen = []
    encoder.embed_ids(ids, lambda ids, embedded: seen.append((ids, embedded)) or embedded)
    assert torch.equal(seen[0][0], ids)
    assert torch.equal(seen[0][1][0, 2], encoder.token_embedding.weight[ids[0, 2]])


def test_a_token_does_not_look_ahead():
    encoder = build()
    one, two = encoder("a photo of a dog"), encoder("a photo of a cat, on the beach")
    torch.testing.assert_close(one[0, :4], two[0, :4])
    assert not torch.allclose(one[0, 5], two[0, 5], atol=1e-3)


def test_it_is_frozen_unless_told_otherwise():
    assert not any(parameter.requires_grad for parameter in build().parameters())
    assert all(parameter.requires_grad for parameter in build(freeze=False).parameters())


def test_a_vocabulary_with_more_words_than_clips():
    """Other tools keep what was learned in the model, as words that they add to its vocabulary."""
    encoder = build(arch=TINY | {"vocabulary": 49410})
    assert encoder.token_embedding.weight.shape == (49410, 32)
    assert encoder("a dog").shape == (1, 77, 32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "first"}, ConfigError, "layer 'first' is unknown; use last or penultimate"),
        ({"arch": "ViT-X"}, ConfigError, "arch 'ViT-X' is unknown; use one of ViT-L-14, ViT-H-14"),
        ({"max_length": 78}, UserError, "has 77 positions, fewer than max_length 78"),
        ({"tokenizer": "./absent"}, UserError, "tokenizer './absent': there is no such folder"),
    ],
)
def test_mistakes_are_one_line(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)
