"""What all samplers share, on each of them."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import gaussian
from ldm.util import UserError

SAMPLERS = [DDIMSampler, PLMSSampler, DPMSolverSampler]
SHAPE = (1, 4, 4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_seed_decides_the_sample(gaussian_model, sampler_class) -> None:
    sampler = sampler_class(gaussian_model())
    first, _ = sampler.sample(5, 2, SHAPE, generator=seeded(1))
    again, _ = sampler.sample(5, 2, SHAPE, generator=seeded(1))
    other, _ = sampler.sample(5, 2, SHAPE, generator=seeded(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.shape == (2, *SHAPE) and not torch.equal(first, other)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_samples_follow_the_data(gaussian_model, sampler_class) -> None:
    model = gaussian_model()
    samples, _ = sampler_class(model).sample(50, 64, (4, 8, 8), generator=seeded(0))
    assert samples.mean().item() == pytest.approx(model.mean, abs=0.03)
    assert samples.std().item() == pytest.approx(model.deviation, rel=0.12)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_parameterizations_give_the_same_sample(gaussian_model, sampler_class, parameterization) -> None:
    x_T = torch.randn(1, *SHAPE, dtype=torch.float64)
    reference, _ = sampler_class(gaussian_model()).sample(10, 1, SHAPE, x_T=x_T)
    sample, _ = sampler_class(gaussian_model(parameterization)).sample(10, 1, SHAPE, x_T=x_T)
    torch.testing.assert_close(sample, reference)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_the_mask_keeps_what_is_known(gaussian_model, sampler_class) -> None:
    x0 = torch.full((2, *SHAPE), 3.0, dtype=torch.float64)  # far from the data, so that it shows
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1.0
    samples, _ = sampler_class(gaussian_model()).sample(50, 2, SHAPE, mask=mask, x0=x0, generator=seeded(0))
    assert (samples[..., :2] - 3.0).abs().max() < 0.6
    assert samples[..., 2:].max() < 2.2


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_the_way_is_recorded_and_callbacks_are_called(gaussian_model, sampler_class) -> None:
    numbers, seen = [], []
    samples, way = sampler_class(gaussian_model()).sample(
        10,
        1,
        SHAPE,
        callback=numbers.append,
        img_callback=lambda x0, number: seen.append((tuple(x0.shape), number)),
        log_every_t=4,
    )
    assert numbers == list(range(10)) and seen == [((1, *SHAPE), number) for number in range(10)]
    # the start, the first step (index 9), and indices 8, 4 and 0
    assert [len(way["x_inter"]), len(way["pred_x0"])] == [5, 5]
    assert torch.equal(way["x_inter"][-1], samples)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_quantize_moves_the_predicted_latents_to_the_codebook(gaussian_model, sampler_class) -> None:
    class FirstStage:
        def quantize(self, x0):
            return torch.ones_like(x0), None, None

    model = gaussian_model()
    model.first_stage_model = FirstStage()
    _, way = sampler_class(model).sample(4, 1, SHAPE, quantize_x0=True, log_every_t=1)
    assert all(torch.equal(x0, torch.ones_like(x0)) for x0 in way["pred_x0"][1:])


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 300, 1000])
def test_any_number_of_steps_runs(gaussian_model, sampler_class, steps: int) -> None:
    model = gaussian_model()
    samples, _ = sampler_class(model).sample(steps, 1, SHAPE)
    assert torch.isfinite(samples).all()
    assert len(model.calls) == steps + (sampler_class is PLMSSampler)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"S": 0}, "must be at least 1"),
        ({"conditioning": torch.zeros(3, 1)}, "conditioning has 3 rows, but batch_size is 2"),
        (
            {"unconditional_conditioning": {"c_crossattn": [torch.zeros(1, 1)]}},
            "has 1 rows, but batch_size is 2",
        ),
        ({"mask": torch.ones(1, 1, 4, 4)}, "mask is given without x0"),
        (
            {"x_T": torch.zeros(1, 1, 4, 4)},
            r"x_T has shape \(1, 1, 4, 4\); it must have the shape \(2, 1, 4, 4\)",
        ),
        (
            {"normals_sequence": [torch.zeros(2, 1, 4, 4)]},
            "holds 1 tensors; give one for each of the 5 steps",
        ),
    ],
)
def test_what_does_not_fit_is_named(gaussian_model, sampler_class, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler_class(gaussian_model()).sample(**{"S": 5, "batch_size": 2, "shape": SHAPE} | arguments)


def test_noise_per_image_does_not_depend_on_the_batch() -> None:
    both = gaussian(torch.empty(2, 3), [seeded(5), seeded(6)])
    alone = gaussian(torch.empty(1, 3), [seeded(6)])
    assert torch.equal(both[1:], alone)
