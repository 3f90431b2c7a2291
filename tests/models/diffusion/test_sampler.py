"""The base of the samplers, tested on each of them, and guidance."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import GuidedEps, SamplingRun, gaussian, to_eps
from ldm.models.diffusion.steps import Step, steps_taken
from ldm.util import UserError

SAMPLERS = [DDIMSampler, PLMSSampler, DPMSolverSampler]
SHAPE = (1, 4, 4)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_seed_determines_the_sample(gaussian_model, sampler_class) -> None:
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


def test_known_latents_have_the_noise_of_the_level_that_the_step_begins_at() -> None:
    x, x0, mask = torch.ones(2, *SHAPE), torch.full((2, *SHAPE), 3.0), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1.0
    run = SamplingRun(steps=[], eps=None, mask=mask, x0=x0, generator=seeded(3))
    kept = run.keep_known(x, Step(index=1, t=500.0, alpha=0.36, alpha_prev=0.64))
    noise = gaussian(x, seeded(3))
    torch.testing.assert_close(kept[..., :2], (0.6 * 3.0 + 0.8 * noise)[..., :2])
    assert torch.equal(kept[..., 2:], x[..., 2:])


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_strength_takes_the_last_steps_from_the_noised_latent(gaussian_model, sampler_class) -> None:
    x0 = torch.full((1, *SHAPE), 1.0, dtype=torch.float64)
    noise = torch.randn(2, *SHAPE, generator=seeded(0), dtype=torch.float64)
    model = gaussian_model()
    sampler = sampler_class(model)
    done: list[int] = []
    half, kept = sampler.sample(10, 2, SHAPE, x_T=noise, x0=x0, strength=0.5, callback=done.append)
    assert done == [0, 1, 2, 3, 4]
    step = sampler.schedule(10, 0.0)[5]
    torch.testing.assert_close(
        kept["x_inter"][0], math.sqrt(step.alpha) * x0 + math.sqrt(1 - step.alpha) * noise
    )
    assert max(t for _, t in model.calls) <= step.t
    none, _ = sampler.sample(10, 2, SHAPE, x_T=noise, x0=x0, strength=0.0)
    assert torch.equal(none, x0.expand(2, -1, -1, -1))
    little, _ = sampler.sample(10, 2, SHAPE, x_T=noise, x0=x0, strength=0.1)
    assert (little - x0).abs().mean() < (half - x0).abs().mean()
    with pytest.raises(UserError, match="without x0"):
        sampler.sample(10, 2, SHAPE, strength=0.5)


def test_the_share_of_steps_is_rounded_up() -> None:
    shares = {(0.0, 50): 0, (0.001, 50): 1, (0.6, 50): 30, (0.7, 10): 7, (0.75, 50): 38, (1.0, 7): 7}
    assert {key: steps_taken(*key) for key in shares} == shares


def test_a_condition_may_be_added_to_another_in_any_strength(gaussian_model) -> None:
    model = gaussian_model()
    x = torch.randn(2, *SHAPE, generator=seeded(0), dtype=torch.float64)
    cond, base, uncond = (torch.full((2, 1), value) for value in (0.7, 0.2, -0.1))
    times = torch.full((2,), 500)
    alpha = model.alpha_at(500)
    eps = {id(one): model.apply_model(x, times, one) for one in (cond, base, uncond)}
    mixed = eps[id(base)] + 1.5 * (eps[id(cond)] - eps[id(base)])
    guided = eps[id(uncond)] + 3 * (mixed - eps[id(uncond)])
    model.calls.clear()
    for scale, expected, count in ((3.0, guided, 6), (1.0, mixed, 4)):
        found = GuidedEps(model, cond, uncond, scale, base=base, strength=1.5)(x, 500, alpha)
        torch.testing.assert_close(found, expected)
        assert model.calls.pop() == (count, 500.0), "one call"
    plain = GuidedEps(model, cond, uncond, 3.0)(x, 500, alpha)
    assert torch.equal(GuidedEps(model, cond, uncond, 3.0, base=base)(x, 500, alpha), plain)
    assert [count for count, _ in model.calls] == [4, 4], "strength 1 costs nothing"


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_intermediates_are_kept_and_callbacks_called(gaussian_model, sampler_class) -> None:
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
def test_every_number_of_steps_works(gaussian_model, sampler_class, steps: int) -> None:
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
def test_arguments_that_do_not_fit_are_errors(
    gaussian_model, sampler_class, arguments: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sampler_class(gaussian_model()).sample(**{"S": 5, "batch_size": 2, "shape": SHAPE} | arguments)


def test_noise_per_image_does_not_depend_on_the_batch() -> None:
    both = gaussian(torch.empty(2, 3), [seeded(5), seeded(6)])
    alone = gaussian(torch.empty(1, 3), [seeded(6)])
    assert torch.equal(both[1:], alone)


def test_guidance_is_one_batched_call_with_the_unconditional_half_first(gaussian_model) -> None:
    model = gaussian_model()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    cond, uncond = torch.full((2, 1), 0.7), torch.zeros(2, 1)
    guided = GuidedEps(model, cond, uncond, scale=5.0)(x, 501, model.alpha_at(501))
    assert model.calls == [(4, 501.0)]
    t = torch.tensor([501, 501])
    without, with_cond = model.apply_model(x, t, uncond), model.apply_model(x, t, cond)
    torch.testing.assert_close(guided, without + 5.0 * (with_cond - without))


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_without_guidance_the_model_sees_the_condition_only(gaussian_model, scale: float) -> None:
    model = gaussian_model()
    uncond = torch.zeros(2, 1) if scale == 1.0 else None
    GuidedEps(model, torch.ones(2, 1), uncond, scale)(torch.randn(2, 1, 4, 4), 5, 0.9)
    assert model.calls == [(2, 5.0)]


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_every_parameterization_gives_the_same_guided_noise(gaussian_model, parameterization: str) -> None:
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    cond, uncond = torch.full((2, 1), 0.7), torch.zeros(2, 1)
    model, reference = gaussian_model(parameterization), gaussian_model()
    alpha = model.alpha_at(300)
    torch.testing.assert_close(
        GuidedEps(model, cond, uncond, 4.0)(x, 300, alpha),
        GuidedEps(reference, cond, uncond, 4.0)(x, 300, alpha),
    )


def test_v_is_converted_by_its_definition() -> None:
    x0, eps, alpha = torch.tensor(0.4), torch.tensor(-1.3), 0.64
    x = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
    v = math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * x0
    torch.testing.assert_close(to_eps(v, x, alpha, "v"), eps)
    torch.testing.assert_close(to_eps(x0, x, alpha, "x0"), eps)


def test_an_unknown_parameterization_is_an_error() -> None:
    with pytest.raises(UserError, match='parameterization "score"; known are eps, x0 and v'):
        to_eps(torch.zeros(1), torch.zeros(1), 0.5, "score")


def test_corrector_sees_the_guided_noise_and_its_arguments(gaussian_model) -> None:
    class Corrector:
        def modify_score(self, model, eps, x, t, cond, factor):
            return factor * eps

    x = torch.randn(1, 1, 4, 4)
    plain = GuidedEps(gaussian_model(), None)(x, 9, 0.8)
    corrected = GuidedEps(gaussian_model(), None, corrector=Corrector(), corrector_kwargs={"factor": 3.0})(
        x, 9, 0.8
    )
    torch.testing.assert_close(corrected, 3.0 * plain)


def test_timesteps_stay_integers_unless_fractional() -> None:
    class Recorder:
        def apply_model(self, x, t, cond):
            self.t = t
            return x

    recorder = Recorder()
    GuidedEps(recorder, None)(torch.zeros(2, 1), 12.0, 0.5)
    assert recorder.t.dtype == torch.long and recorder.t.tolist() == [12, 12]
    GuidedEps(recorder, None)(torch.zeros(2, 1), 12.5, 0.5)
    assert recorder.t.tolist() == [12.5, 12.5]


def test_the_noise_keeps_the_dtype_of_the_latent() -> None:
    class Half:
        def apply_model(self, x, t, cond):
            return x.half()

    assert GuidedEps(Half(), None)(torch.zeros(1, 1), 3, 0.5).dtype == torch.float32
