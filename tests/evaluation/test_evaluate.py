from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.creatures.world import creature
from ldm.evaluation import evaluate
from ldm.evaluation.concepts import EVALUATION_SEEDS, ConceptFolder, draw_creatures
from ldm.evaluation.evaluate import (
    FIRST_STAGE,
    LIKENESS,
    OTHERS,
    REDRAWN,
    Evaluation,
    Sampling,
    evaluation_prompts,
    psnr,
    reconstruct,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError
from tests.evaluation.stand_ins import FixedJudge, MeanColor, use_few_renderings
from tests.golden_record import Golden

ONE = creature(EVALUATION_SEEDS[1])


class Identity:
    """A model whose first stage changes nothing."""

    device, dtype = torch.device("cpu"), torch.float32
    encode_first_stage = get_first_stage_encoding = decode_first_stage = staticmethod(lambda x: x)


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """Every prompt that is generated; the images are the creature redrawn."""
    cases: list[str] = []

    def generate(model, prompts, on_image=None, **settings):
        cases.extend(prompts)
        for place, _ in enumerate(prompts if on_image else []):
            on_image(place, None)
        return draw_creatures([ONE] * len(prompts), 32, take=9)

    use_few_renderings(monkeypatch)
    monkeypatch.setattr(evaluate, "generate", generate)
    return cases


def concept(tmp_path, **truth) -> ConceptFolder:
    return ConceptFolder("own", tmp_path, [Image.new("RGB", (40, 40), "red")] * 2, **truth)


def test_a_creature_is_generated_edited_and_compared(prompts, tmp_path) -> None:
    features, own = MeanColor(), concept(tmp_path, creature=ONE)
    bench = Evaluation(Identity(), Sampling(), FixedJudge(ONE.seed), [features], 32)
    cases = evaluation_prompts(own, ["{} swimming", LIKENESS], True, 32, None)
    assert len(cases) == 12
    done: list[int] = []
    figures, rows = bench.measure(own, cases[:4], "*", ["*"], 2, lambda: done.append(1))
    assert list(figures)[:2] == ["a photo of *", "* swimming"] and len(done) == 8
    assert prompts == [prompt for prompt in figures for _ in range(2)]
    assert features.prompts[:2] == ["a photo of", "swimming"]
    assert figures["a photo of *"]["attributes"] == 1 and figures["a photo of *"]["retrieved"] == 1
    assert figures["a photo of *"]["among"] == 5
    edit = figures[list(figures)[2]]
    assert edit["group"] == "plain" and "clip_t" in edit["features"]["mean-color"]
    assert [label for label, _ in rows] == list(figures)
    references, drawn = bench.measure_baselines(own)
    assert list(references) == [REDRAWN, FIRST_STAGE, OTHERS] == [label for label, _ in drawn]
    assert (
        references[REDRAWN]["identity"]
        == references[FIRST_STAGE]["identity"]
        > references[OTHERS]["identity"]
    )
    assert bench.creature_reference(ONE) is bench.creature_reference(ONE)


def test_photos_without_truth_have_the_protocol_and_colours(prompts, tmp_path) -> None:
    own = concept(tmp_path)
    bench = Evaluation(Identity(), Sampling(), None, [MeanColor()], 32)
    cases = evaluation_prompts(own, [], True, 32, None)
    figures, _ = bench.measure(own, cases, "<me>", ["<me>"], 1)
    assert list(figures) == ["a photo of <me>"]
    assert set(figures["a photo of <me>"]) == {"palette_overlap", "features"}
    assert bench.measure_baselines(own) == ({}, [])


def test_a_style_is_applied_to_four_species(prompts, tmp_path) -> None:
    own = concept(tmp_path, style="sunset")
    bench = Evaluation(Identity(), Sampling(), None, [], 32)
    cases = evaluation_prompts(own, [], True, 32, None)
    figures, _ = bench.measure(own, cases, "*", ["*"], 1)
    assert len(figures) == 5 and "a painting in the style of *" in figures
    assert sum("in_style" in found for found in figures.values()) == 4
    assert len(evaluation_prompts(own, [], False, 32, None)) == 1


def test_invalid_settings_are_user_errors() -> None:
    with pytest.raises(UserError, match="sampler"):
        Sampling(sampler="euler")


PROMPTS = ["a photo", "a painting of a dog", "sculpture"]


def test_prompts_drawn_together_are_those_drawn_alone() -> None:
    model = Golden("clip_one_vector").model()
    counted = []
    together = list(Sampling(steps=2, batch_size=5).draw(model, PROMPTS, 2, lambda: counted.append(1)))
    assert [len(images) for images in together] == [2, 2, 2] and len(counted) == 6
    for prompt, images in zip(PROMPTS, together, strict=True):
        (alone,) = Sampling(steps=2, batch_size=1).draw(model, [prompt], 2)
        for one, other in zip(images, alone, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert not np.array_equal(np.asarray(together[0][0]), np.asarray(together[0][1]))
    assert not np.array_equal(np.asarray(together[0][0]), np.asarray(together[1][0]))


class Halving:
    """A first stage whose latents are the images, and whose posterior is wide."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode_first_stage(self, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(torch.cat([pixels, torch.full_like(pixels, 3.0)], 1))

    def get_first_stage_encoding(self, latent: torch.Tensor) -> torch.Tensor:
        assert isinstance(latent, torch.Tensor), "a sample of the posterior would be noisy"
        return latent * 5

    def decode_first_stage(self, z: torch.Tensor) -> torch.Tensor:
        return z / 5


def test_images_are_decoded_from_the_posteriors_mode(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "_BATCH", 2)
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "navy")]
    found = reconstruct(Halving(), images)
    assert [np.asarray(one).tolist() for one in found] == [np.asarray(one).tolist() for one in images]


def test_psnr_is_of_the_squared_error_of_each_image() -> None:
    black = Image.new("RGB", (8, 8), (100, 100, 100))
    near, far = Image.new("RGB", (8, 8), (110, 100, 100)), Image.new("RGB", (8, 8), (125, 125, 125))
    wanted = [10 * math.log10(255**2 / (100 / 3)), 10 * math.log10(255**2 / 625)]
    mean, spread = psnr([black, black], [near, far])
    assert mean == pytest.approx(sum(wanted) / 2, abs=0.01)
    assert spread == pytest.approx((wanted[0] - wanted[1]) / 2, abs=0.01)
