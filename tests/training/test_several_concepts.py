"""Several concepts in one run do not disturb one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import main
from ldm import embeddings
from ldm.data.personalized import PersonalizedBase
from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill

A, B = "*", "@"


@pytest.fixture
def model():
    config = Golden("clip_one_vector").config()
    params = config.params.personalization_config.params
    params.placeholder_strings, params.initializer_words = [A, B], ["cat", "dog"]
    with skip_pretrained():
        model = fill(instantiate_from_config(config)).train()
    model.learning_rate = 1e-2
    return model


def samples(words: str) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Latents, captions, timesteps and noise of some samples; a concept's are the same wherever they stand."""
    kinds = {A: torch.Generator().manual_seed(1), B: torch.Generator().manual_seed(2)}
    drawn = [
        (
            torch.randn(2, 4, 16, 16, generator=kinds[word]),
            torch.randint(0, 1000, (1,), generator=kinds[word]),
        )
        for word in words
    ]
    pairs = torch.stack([pair for pair, _ in drawn])
    return (
        pairs[:, 0],
        [f"a photo of {word}" for word in words],
        torch.cat([t for _, t in drawn]),
        pairs[:, 1],
    )


def gradients(model, words: str) -> dict[str, Tensor]:
    z, captions, t, noise = samples(words)
    z, noise = z[:, : model.channels], noise[:, : model.channels]
    model.zero_grad()
    loss, _ = model.p_losses(z, model.get_learned_conditioning(captions), t, noise=noise)
    loss.backward()
    return {word: model.embedding_manager.vectors(word).grad for word in (A, B)}


def test_a_vectors_gradient_comes_from_its_own_samples(model) -> None:
    alone = gradients(model, A + A)[A].clone()
    mixed = gradients(model, A + B + A + B)[A]
    # The mean over twice as many samples.
    torch.testing.assert_close(mixed * 2, alone, rtol=2e-3, atol=2e-4 * float(alone.abs().max()))


def step(model, optimizer, words: str) -> None:
    """One step through the hooks that Lightning calls."""
    z, captions, _, _ = samples(words)
    optimizer.zero_grad()
    loss, _ = model(z[:, : model.channels], captions)
    loss.backward()
    model.on_before_optimizer_step(optimizer)
    optimizer.step()


def test_a_word_that_no_caption_holds_rests_with_its_moments(model, monkeypatch) -> None:
    """Under AdamW with weight decay, and after steps that have given it momentum."""
    monkeypatch.setattr(type(model), "trainer", type("One", (), {"world_size": 1}))
    torch.manual_seed(0)
    optimizer = model.configure_optimizers()
    step(model, optimizer, A + B)
    held = model.embedding_manager
    vectors = held.vectors(B)
    before = vectors.detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[vectors].items()}
    moving = held.vectors(A).detach().clone()
    for _ in range(3):
        step(model, optimizer, A + A)
    assert torch.equal(vectors, before)
    assert all(torch.equal(optimizer.state[vectors][key], value) for key, value in moments.items())
    assert not torch.equal(held.vectors(A), moving)
    step(model, optimizer, B + B)
    assert not torch.equal(vectors, before)


def test_accumulated_batches_count_together(model, monkeypatch) -> None:
    monkeypatch.setattr(type(model), "trainer", type("One", (), {"world_size": 1}))
    optimizer = model.configure_optimizers()
    for words in (A + A, B + B):
        z, captions, _, _ = samples(words)
        model(z[:, : model.channels], captions)[0].backward()
    model.on_before_optimizer_step(optimizer)
    assert all(model.embedding_manager.vectors(word).grad is not None for word in (A, B))


def test_batches_are_mixed_and_each_concept_has_its_file(tiny_yaml, tmp_path, pictures) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * number, np.uint8)).save(other / f"{number}.png")
    words = tmp_path / "two.yaml"
    OmegaConf.save(
        {
            "data_root": {"<a>": str(pictures), "<b>": str(other)},
            "model": {
                "params": {
                    "personalization_config": {
                        "params": {"placeholder_strings": ["<a>", "<b>"], "initializer_words": ["cat", "dog"]}
                    }
                }
            },
        },
        words,
    )
    assert main.main(["--base", str(tiny_yaml), str(words), "-t", "--max_steps", "3"]) == 0
    (run,) = Path("logs").iterdir()
    for name in ("a", "b"):
        (concept,) = embeddings.read(run / "checkpoints" / f"{name}.safetensors").concepts
        assert concept.trigger == f"<{name}>"
    data = PersonalizedBase({"<a>": pictures, "<b>": other}, size=32, repeats=2)
    captions = [data[index]["caption"] for index in range(len(data))]
    assert sum("<a>" in caption for caption in captions) == sum("<b>" in caption for caption in captions) == 6
