from __future__ import annotations

import pytest
import torch
from PIL import Image

from ldm.data.creatures.world import creature
from ldm.evaluation import evaluate
from ldm.evaluation.concepts import SEEDS, ConceptFolder, redrawn
from ldm.evaluation.evaluate import FIRST_STAGE, LIKENESS, OTHERS, REDRAWN, Evaluation, Sampling, what_to_ask
from ldm.util import UserError
from tests.evaluation.stand_ins import MeanColor, SayingJudge, draw_little

ONE = creature(SEEDS[1])


class Identity:
    """A model whose first stage changes nothing."""

    device, dtype = torch.device("cpu"), torch.float32
    encode_first_stage = get_first_stage_encoding = decode_first_stage = staticmethod(lambda x: x)


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """Every prompt asked for; the pictures are the creature redrawn."""
    asked: list[str] = []

    def generate(model, prompts, on_image=None, **settings):
        asked.extend(prompts)
        for place, _ in enumerate(prompts if on_image else []):
            on_image(place, None)
        return redrawn([ONE] * len(prompts), 32, take=9)

    draw_little(monkeypatch)
    monkeypatch.setattr(evaluate, "generate", generate)
    return asked


def concept(tmp_path, **truth) -> ConceptFolder:
    return ConceptFolder("own", tmp_path, [Image.new("RGB", (40, 40), "red")] * 2, **truth)


def test_a_creature_is_asked_for_edited_and_compared(prompts, tmp_path) -> None:
    features, own = MeanColor(), concept(tmp_path, creature=ONE)
    bench = Evaluation(Identity(), Sampling(), SayingJudge(ONE.seed), [features], 32)
    asked = what_to_ask(own, ["{} swimming", LIKENESS], True, 32, None)
    assert len(asked) == 12
    done: list[int] = []
    figures, rows = bench.ask(own, asked[:4], "*", ["*"], 2, lambda: done.append(1))
    assert list(figures)[:2] == ["a photo of *", "* swimming"] and len(done) == 8
    assert prompts == [prompt for prompt in figures for _ in range(2)]
    assert features.told[:2] == ["a photo of", "swimming"]
    assert figures["a photo of *"]["attributes"] == 1 and figures["a photo of *"]["retrieved"] == 1
    assert figures["a photo of *"]["among"] == 5
    edit = figures[list(figures)[2]]
    assert edit["group"] == "plain" and "clip_t" in edit["features"]["mean-color"]
    assert [label for label, _ in rows] == list(figures)
    references, drawn = bench.references(own)
    assert list(references) == [REDRAWN, FIRST_STAGE, OTHERS] == [label for label, _ in drawn]
    assert (
        references[REDRAWN]["identity"]
        == references[FIRST_STAGE]["identity"]
        > references[OTHERS]["identity"]
    )
    assert bench.subject(ONE) is bench.subject(ONE)


def test_photos_without_truth_have_the_protocol_and_colours(prompts, tmp_path) -> None:
    own = concept(tmp_path)
    bench = Evaluation(Identity(), Sampling(), None, [MeanColor()], 32)
    asked = what_to_ask(own, [], True, 32, None)
    figures, _ = bench.ask(own, asked, "<me>", ["<me>"], 1)
    assert list(figures) == ["a photo of <me>"]
    assert set(figures["a photo of <me>"]) == {"palette_overlap", "features"}
    assert bench.references(own) == ({}, [])


def test_a_style_is_tried_on_four_species(prompts, tmp_path) -> None:
    own = concept(tmp_path, style="sunset")
    bench = Evaluation(Identity(), Sampling(), None, [], 32)
    asked = what_to_ask(own, [], True, 32, None)
    figures, _ = bench.ask(own, asked, "*", ["*"], 1)
    assert len(figures) == 5 and "a painting in the style of *" in figures
    assert sum("in_style" in found for found in figures.values()) == 4
    assert len(what_to_ask(own, [], False, 32, None)) == 1


def test_settings_that_make_no_sense_are_told() -> None:
    with pytest.raises(UserError, match="sampler"):
        Sampling(sampler="euler")
