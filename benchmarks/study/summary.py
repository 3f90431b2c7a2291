"""A summary of a study: means and standard deviations over creatures and seeds, and the bars set for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study.plan import Inversion
from ldm.evaluation.evaluate import REDRAWN

Measured = Mapping[Inversion, Mapping[str, Any]]
Summary = dict[str, dict[str, Any]]
# References besides those of an evaluation: prompts without a learned word.
CREATURE, WORDS = "a photo of a creature", "best caption in words"
MEASURES = ("attributes", "identity", "itself", "color_distance", "retrieved", "rank", "clip_i")
GROUPS = ("plain", "scene", "style")
# The bar for the seconds of an inversion, by the side of the images.
_SECONDS = {32: 60.0, 64: 240.0}


@dataclass(frozen=True)
class Bar:
    """A value that a figure has to reach; `met` is None if the figure was not measured."""

    text: str
    value: float | None
    bound: float | None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None or self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def figures_of(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of one inversion or reference by name: likeness, edits, styles and seconds."""
    likeness = measured.get("likeness") or {}
    features = next(iter((likeness.get("features") or {}).values()), {})
    found: dict[str, float | None] = {name: likeness.get(name) for name in MEASURES}
    found["clip_i"] = features.get("clip_i", {}).get("pairwise")
    edits = list((measured.get("edits") or {}).values())
    for group in (*GROUPS, "all"):
        chosen = [one for one in edits if group in (one["group"], "all")]
        for name in ("obeyed", "both"):
            found[f"{group} {name}"] = _mean([one[name] for one in chosen])
    styled = list((measured.get("styled") or {}).values())
    for name in ("style", "in_style", "kind", "kind_of_truth"):
        found[name] = _mean([one.get(name) for one in styled])
    return found | {"seconds": measured.get("seconds")}


def summarize(measured: Measured) -> Summary:
    """Return for each figure its mean, its standard deviation over creatures, and the mean one over seeds.

    A standard deviation over one creature or one seed is None. "n" is the number of inversions.
    """
    names = dict.fromkeys(key for figures in map(figures_of, measured.values()) for key in figures)
    summary: Summary = {}
    for name in names:
        by_concept: dict[str, list[float]] = {}
        for inversion, figures in measured.items():
            value = figures_of(figures)[name]
            if value is not None:
                by_concept.setdefault(inversion.concept, []).append(value)
        if by_concept:
            several = [values for values in by_concept.values() if len(values) > 1]
            means = [float(np.mean(values)) for values in by_concept.values()]
            summary[name] = {
                "mean": round(float(np.mean(means)), 5),
                "over_creatures": round(float(np.std(means, ddof=1)), 5) if len(means) > 1 else None,
                "over_seeds": _mean([float(np.std(values, ddof=1)) for values in several]),
                "n": sum(map(len, by_concept.values())),
            }
    return summary


def relative_color_distance(summary: Summary, references: Mapping[str, Summary]) -> float | None:
    """Return the colour distance on a scale from 0 (the creature redrawn) to 1 ("a photo of a creature")."""
    ours, best, chance = (
        found.get("color_distance", {}).get("mean")
        for found in (summary, references.get(REDRAWN, {}), references.get(CREATURE, {}))
    )
    if ours is None or best is None or chance is None or chance <= best:
        return None
    return round((ours - best) / (chance - best), 5)


def bars(by_vectors: Mapping[int, Summary], references: Mapping[str, Summary], size: int) -> list[Bar]:
    """Return the bars of the study with the measured values."""
    words = references.get(WORDS, {})
    found: list[Bar] = []
    for count, summary in by_vectors.items():

        def of(name: str, within: Summary = summary) -> float | None:
            return within.get(name, {}).get("mean")

        many = count > 1
        title = f"{count} vector{'s' * many}: "
        found += [
            Bar(title + "attributes", of("attributes"), 0.82 if many else 0.75),
            Bar(title + "first of 100 creatures", of("retrieved"), 0.8 if many else 0.6),
            Bar(title + "CLIP-I, against the best caption", of("clip_i"), of("clip_i", words)),
            Bar(
                title + "colour distance, against it",
                of("color_distance"),
                of("color_distance", words),
                False,
            ),
            Bar(title + "edit obeyed and creature itself", of("all both"), 0.8),
            Bar(title + "seconds", of("seconds"), _SECONDS.get(size), False),
        ]
        if not many:
            way = relative_color_distance(summary, references)
            found.insert(1, Bar(title + "colours, from redrawn to a photo of a creature", way, 0.5, False))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 5) if known else None
