from __future__ import annotations

import pytest
import torch

from ldm.training.callbacks.fixed_loss import FixedNoiseLoss, copy_of_state, temporary_state
from tests.golden_record import Golden


class Pictures:
    """Six pictures, each three times with a caption of its own; a draw takes random numbers."""

    num_images = 6

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict:
        torch.rand(1)
        generator = torch.Generator().manual_seed(index % 6)
        return {
            "image": torch.rand(32, 32, 3, generator=generator) * 2 - 1,
            "caption": f"photo * of {index}",
        }


@pytest.fixture
def model():
    return Golden("clip_one_vector").model()


def test_it_measures_the_loss_at_fixed_places(model) -> None:
    yardstick = FixedNoiseLoss(model, Pictures(), samples=8, chunk=3)
    timesteps = torch.cat(yardstick.timesteps)
    assert sorted((timesteps * 8 // model.num_timesteps).tolist()) == list(range(8))
    latents, noise = torch.cat(yardstick.latents), torch.cat(yardstick.noise)
    captions = [caption for chunk in yardstick.captions for caption in chunk]
    expected = 0.0
    for i in range(8):
        one = slice(i, i + 1)
        condition = model.get_learned_conditioning(captions[one])
        loss, _ = model.p_losses(latents[one], condition, timesteps[one], noise[one])
        expected += loss.item() / 8
    assert yardstick.measure(model) == pytest.approx(expected, rel=1e-4)
    assert yardstick.measure(model) == yardstick.measure(model)


def test_another_yardstick_is_the_same_and_the_generators_do_not_notice(model) -> None:
    state = torch.get_rng_state()
    first = FixedNoiseLoss(model, Pictures(), samples=4, chunk=4)
    value = first.measure(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = FixedNoiseLoss(model, Pictures(), samples=4, chunk=4)
    assert second.measure(model) == value


def test_the_samples_are_spread_over_the_pictures(model) -> None:
    def shown(samples):
        chunks = FixedNoiseLoss(model, Pictures(), samples, 4).captions
        return [int(text.split()[-1]) for chunk in chunks for text in chunk]

    assert shown(3) == [0, 2, 4]
    assert shown(8) == list(range(8))


def test_pictures_of_several_sizes_one_at_a_time(model) -> None:
    class Sizes(Pictures):
        def __getitem__(self, index: int) -> dict:
            item = super().__getitem__(index)
            return item | {"image": item["image"][: 32 if index % 2 else 16]}

    yardstick = FixedNoiseLoss(model, Sizes(), samples=4, chunk=1)
    assert {latent.shape[2:] for latent in yardstick.latents} == {(4, 8), (8, 8)}
    assert yardstick.measure(model) > 0


def test_it_feels_the_vectors(model) -> None:
    yardstick = FixedNoiseLoss(model, Pictures(), samples=4, chunk=4)
    before = yardstick.measure(model)
    state = {key: value * 2 for key, value in copy_of_state(model.embedding_manager).items()}
    vector = next(model.embedding_manager.embedding_parameters())
    start = vector.detach().clone()
    with temporary_state(model.embedding_manager, state):
        assert torch.equal(vector, start * 2)
        assert yardstick.measure(model) != before
    assert torch.equal(vector, start) and yardstick.measure(model) == before
