from __future__ import annotations

from typing import Any

import pytest

from benchmarks.study.plan import Inversion
from benchmarks.study.summary import CREATURE, WORDS, Bar, bars, relative_color_distance, summarize
from ldm.evaluation.evaluate import REDRAWN


def record(distance: float, both: float | None = 1.0) -> dict[str, Any]:
    features = {
        "towers": {"clip_i": {"pairwise": 0.5, "averaged": 0.7}},
        "other": {"clip_i": {"pairwise": 0.1}},
    }
    edits = {
        "on blue": {"group": "plain", "obeyed": 1.0, "both": 0.5},
        "a sketch": {"group": "style", "obeyed": both, "both": both},
    }
    likeness = {"attributes": 0.8, "color_distance": distance, "retrieved": 0.9, "features": features}
    return {"seconds": 30.0, "likeness": likeness, "edits": edits}


def test_means_and_spreads_over_creatures_and_seeds() -> None:
    several = {
        Inversion("c0", 1, 0): record(10.0),
        Inversion("c0", 1, 1): record(14.0),
        Inversion("c1", 1, 0): record(20.0),
    }
    summary = summarize(several)
    assert summary["color_distance"] == pytest.approx(
        {"mean": 16.0, "over_creatures": 32**0.5, "over_seeds": 8**0.5, "n": 3}, abs=1e-4
    )
    assert summary["clip_i"]["mean"] == 0.5 and summary["seconds"]["mean"] == 30
    assert summary["plain both"]["mean"] == 0.5 and summary["all both"]["mean"] == 0.75
    assert "scene both" not in summary and "style" not in summary
    alone = summarize({Inversion("c0", 1, 0): record(10.0, both=None)})
    assert alone["color_distance"]["over_creatures"] is None and alone["color_distance"]["over_seeds"] is None
    assert "style both" not in alone and alone["all both"]["mean"] == 0.5


def references(redrawn: float, chance: float) -> dict[str, Any]:
    values = {REDRAWN: redrawn, CREATURE: chance, WORDS: 18.0}
    return {name: summarize({Inversion("c0", 0, 0): record(value)}) for name, value in values.items()}


def test_relative_color_distance_of_references_and_results() -> None:
    summary = summarize({Inversion("c0", 1, 0): record(16.0)})
    assert relative_color_distance(summary, references(6.0, 46.0)) == pytest.approx(0.25)
    assert relative_color_distance(summary, {}) is None
    assert relative_color_distance(summary, references(46.0, 6.0)) is None


def test_bars_are_met_missed_or_not_measured() -> None:
    summary = summarize({Inversion("c0", 1, 0): record(16.0)})
    found = {bar.text: bar for bar in bars({1: summary, 8: summary}, references(6.0, 46.0), 32)}
    met = {text: bar.met for text, bar in found.items()}
    assert met["1 vector: attributes"] is True and met["8 vectors: attributes"] is False
    assert met["1 vector: colours, from redrawn to a photo of a creature"] is True
    assert "8 vectors: colours, from redrawn to a photo of a creature" not in met
    assert met["1 vector: edit obeyed and creature itself"] is False
    assert met["8 vectors: seconds"] is True and found["8 vectors: seconds"].bound == 60
    assert met["1 vector: colour distance, against it"] is True
    assert {bar.met for bar in bars({1: {}}, {}, 128)} == {None}
    assert Bar("", 2.0, 1.0, at_least=False).met is False
