from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import UserError

SHAPE = (1, 4, 4)


def test_ddim_converges_with_order_one(observed_order) -> None:
    assert observed_order(DDIMSampler) == pytest.approx(1.0, abs=0.1)


def test_eta_adds_noise_from_the_generator(gaussian_model) -> None:
    sampler, x_T = DDIMSampler(gaussian_model()), torch.randn(1, *SHAPE)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (sampler.sample(5, 1, SHAPE, eta=1.0, x_T=x_T, generator=seed)[0] for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_stochastic_samples_follow_the_data(gaussian_model) -> None:
    model = gaussian_model()
    samples, _ = DDIMSampler(model).sample(
        100, 64, (4, 8, 8), eta=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert samples.mean().item() == pytest.approx(model.mean, abs=0.03)
    assert samples.std().item() == pytest.approx(model.deviation, rel=0.1)


def test_temperature_dropout_and_given_normals_reach_the_noise(gaussian_model) -> None:
    sampler, x_T = DDIMSampler(gaussian_model()), torch.randn(1, *SHAPE, dtype=torch.float64)
    normals = list(torch.randn(5, 1, *SHAPE, dtype=torch.float64))

    def sampled(**options) -> torch.Tensor:
        return sampler.sample(5, 1, SHAPE, eta=1.0, x_T=x_T, **options)[0]

    given = sampled(normals_sequence=normals)
    assert torch.equal(given, sampled(normals_sequence=normals))
    assert not torch.equal(given, sampled(normals_sequence=[*normals[:3], normals[4], normals[3]]))
    silent = sampled(normals_sequence=[torch.zeros_like(noise) for noise in normals])
    torch.testing.assert_close(sampled(temperature=0.0), silent)
    torch.testing.assert_close(sampled(noise_dropout=1.0), silent)
    halved = sampled(normals_sequence=[noise / 2 for noise in normals])
    torch.testing.assert_close(sampled(normals_sequence=normals, temperature=0.5), halved)


def test_decoding_an_encoded_latent_restores_it(gaussian_model) -> None:
    model = gaussian_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(50)
    x0 = torch.full((2, *SHAPE), 0.9, dtype=torch.float64)
    noised = sampler.stochastic_encode(x0, torch.tensor([4, 4]), noise=torch.zeros_like(x0))
    torch.testing.assert_close(noised, model.alphas_cumprod[81].sqrt() * x0)  # the fifth of 1, 21, 41, 61, 81
    decoded = sampler.decode(noised, None, 5)
    assert len(model.calls) == 5 and model.calls[0][1] == 81.0
    exact = model.flow(noised, model.alphas_cumprod[81].item(), model.alphas_cumprod[0].item())
    assert (decoded - exact).abs().max() < 0.05


def test_decoding_from_full_strength_is_sampling(gaussian_model) -> None:
    model = gaussian_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(10)
    x_T = torch.randn(1, *SHAPE, dtype=torch.float64)
    assert torch.equal(sampler.decode(x_T, None, 10), sampler.sample(10, 1, SHAPE, x_T=x_T)[0])
    at_the_end = sampler.stochastic_encode(x_T, 10, noise=x_T)
    assert torch.equal(at_the_end, sampler.stochastic_encode(x_T, 9, noise=x_T))


def test_a_quadratic_schedule_can_be_chosen(gaussian_model) -> None:
    model = gaussian_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(4, ddim_discretize="quad")
    sampler.decode(torch.randn(1, *SHAPE), None, 4)
    assert [t for _, t in model.calls] == [801.0, 356.0, 89.0, 1.0]


def test_decoding_without_a_schedule_is_an_error(gaussian_model) -> None:
    with pytest.raises(UserError, match="call make_schedule"):
        DDIMSampler(gaussian_model()).decode(torch.zeros(1, *SHAPE), None, 3)
