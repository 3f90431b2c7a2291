from __future__ import annotations

import pytest

from ldm.data.creatures.world import HELD_OUT_STYLES, SPECIES
from ldm.evaluation.concepts import redrawn
from ldm.evaluation.identity import StyledSubject, models_of_styles


def test_four_species_of_four_colours() -> None:
    shown = models_of_styles()
    assert len({one.kind for one in shown}) == len({one.color for one in shown}) == 4
    assert {one.kind for one in shown} <= set(SPECIES)


@pytest.mark.parametrize("style", HELD_OUT_STYLES)
def test_the_style_is_told_from_photos_and_from_other_styles(style) -> None:
    one = models_of_styles()[0]
    subject = StyledSubject(one, style, 32, None)
    assert subject.prompt.endswith(f"{one.color} {one.kind} in the style of {{}}")
    in_style = subject.figures(redrawn([one] * 4, 32, take=9, style=style))
    assert in_style["style"] == pytest.approx(1, abs=0.1) and in_style["in_style"] == 1
    assert "kind" not in in_style
    for other in ("photo", "painting"):
        found = subject.figures(redrawn([one] * 24, 32, take=9, style=other))
        assert found["style"] < 0.2
        assert found["in_style"] < 0.1  # not none: the ground of some is as blue as a blueprint
