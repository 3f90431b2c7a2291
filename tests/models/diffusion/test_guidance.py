from __future__ import annotations

import math

import pytest
import torch

from ldm.models.diffusion.conditioning import concat_conditions, condition_rows
from ldm.models.diffusion.sampler import GuidedEps, to_eps
from ldm.util import UserError


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
def test_no_second_half_where_guidance_has_no_effect(gaussian_model, scale: float) -> None:
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


def test_unknown_parameterization_is_named() -> None:
    with pytest.raises(UserError, match='parameterization "score"; known are eps, x0 and v'):
        to_eps(torch.zeros(1), torch.zeros(1), 0.5, "score")


def test_conditionings_join_as_tensor_list_and_dict() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    both = torch.cat([one, other])
    torch.testing.assert_close(concat_conditions(one, other), both)
    torch.testing.assert_close(concat_conditions([one], [other])[0], both)
    joined = concat_conditions(
        {"c_crossattn": [one], "c_concat": [other]}, {"c_crossattn": [other], "c_concat": [one]}
    )
    torch.testing.assert_close(joined["c_crossattn"][0], both)
    torch.testing.assert_close(joined["c_concat"][0], torch.cat([other, one]))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 77, 8), torch.zeros(1, 77, 16), r"\(1, 77, 8\) and \(1, 77, 16\)"),
        (torch.zeros(1, 4), [torch.zeros(1, 4)], "a tensor of shape .* but the conditioning is a list of 1"),
        (
            {"c_concat": []},
            {"c_crossattn": []},
            "a dict of c_concat but the conditioning is a dict of c_crossattn",
        ),
    ],
)
def test_conditionings_of_different_makes_are_named(first, second, message: str) -> None:
    with pytest.raises(UserError, match=message):
        concat_conditions(first, second)


def test_rows_finds_the_batch_size() -> None:
    assert condition_rows({"c_concat": [], "c_crossattn": [torch.zeros(3, 2)]}) == 3
    assert condition_rows(None) is None and condition_rows([]) is None


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


def test_a_model_in_half_precision_leaves_the_latent_in_its_own() -> None:
    class Half:
        def apply_model(self, x, t, cond):
            return x.half()

    assert GuidedEps(Half(), None)(torch.zeros(1, 1), 3, 0.5).dtype == torch.float32
