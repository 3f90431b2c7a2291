"""Figures for a set of images of one prompt: plain dicts of numbers, as they are written to JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.evaluation.appearance import AppearanceFeatures
from ldm.evaluation.edits import Edit, obeyed
from ldm.evaluation.identity import (
    ITSELF,
    Figures,
    Gallery,
    Readings,
    Subject,
    agreement,
    judge_readings,
    likeness,
    traits,
)
from ldm.generate.embeddings import whole_word
from ldm.models.features import Features

# Pictures per prompt, DDIM steps and guidance with which the paper's figures were made.
SAMPLES, STEPS, SCALE = 64, 50, 5.0


def similarity(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Two readings of the likeness of unit features [N, d] and [M, d], each -1 to 1.

    "pairwise" is the mean over all pairs of cosines, as the original's code has it; "averaged" is the cosine of the
    averaged features, as the paper's text has it, and always the larger where it is positive.
    """
    return {
        "pairwise": float((ours @ theirs.T).mean()),
        "averaged": float(F.cosine_similarity(ours.mean(0), theirs.mean(0), dim=0)),
    }


def without_placeholders(prompt: str, placeholders: Iterable[str]) -> str:
    """The prompt that CLIP-T compares with: "a photo of * on the moon" becomes "a photo of on the moon"."""
    for name in sorted(placeholders, key=len, reverse=True):
        prompt = re.sub(whole_word(name), " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())


def identity_figures(
    pictures: Sequence[Image.Image], subject: Subject, gallery: Gallery | None = None
) -> Figures:
    """Likeness to a creature: its parts, the raw and the calibrated score, and retrieval where there is a gallery.

    `attributes` and `attribute` (each by itself) are there where the subject has a judge.
    """
    looks, readings = AppearanceFeatures.of(pictures), judge_readings(subject.judge, pictures)
    raw = likeness(looks, readings, subject.truth, subject.creature)
    calibrated = subject.calibrated(raw)
    figures: Figures = {
        "palette_overlap": _mean(looks.palette_overlap(subject.truth)),
        "silhouette": _mean(looks.shape_overlap(subject.truth)),
        "color_distance": _mean(looks.color_distance(subject.truth)),
        "likeness": _mean(raw),
        "identity": _mean(calibrated),
        "itself": _mean(calibrated > ITSELF),
    }
    if readings is not None:
        figures["attributes"] = _mean(agreement(readings, subject.creature))
        figures["attribute"] = _each_attribute(readings, subject)
    if gallery is not None:
        ranks = gallery.ranks(looks, readings, subject)
        figures |= {"retrieved": _mean(ranks == 1), "rank": _mean(ranks), "among": len(gallery.creatures)}
    return figures


def edit_figures(edit: Edit, pictures: Sequence[Image.Image], subject: Subject) -> Figures:
    """Whether pictures have what an edit asks for, and still show the creature, as it looks there.

    `subject` is the creature in the edit's background and style. Without a judge `obeyed` and `both` are known of
    plain backgrounds only, else None.
    """
    readings = judge_readings(subject.judge, pictures)
    calibrated = subject.calibrated(
        likeness(AppearanceFeatures.of(pictures), readings, subject.truth, subject.creature)
    )
    does, itself = obeyed(edit, pictures, readings), calibrated > ITSELF
    return {
        "asks_for": f"{edit.attribute}: {edit.value}",
        "group": edit.group,
        "obeyed": None if does is None else _mean(does),
        "itself": _mean(itself),
        "both": None if does is None else _mean(does & itself),
        "identity": _mean(calibrated),
    }


def protocol_figures(
    extractors: Sequence[Features],
    pictures: Sequence[Image.Image],
    inputs: Sequence[Tensor],
    text: str,
) -> Figures:
    """CLIP-I against the concept's pictures and CLIP-T against `text`, by the name of each extractor.

    `inputs` are the features of the concept's pictures, [M, d] by each extractor; one without words has no CLIP-T.
    """
    figures: Figures = {}
    for features, theirs in zip(extractors, inputs, strict=True):
        ours, words = features.image(pictures), features.text([text])
        figures[features.name] = {"clip_i": similarity(ours, theirs)}
        if words is not None:
            figures[features.name]["clip_t"] = similarity(ours, words)
    return figures


def mean_figures(several: Sequence[Figures]) -> Figures:
    """The mean of each number over those dicts that have it, nested ones likewise; words stay if they all agree."""
    merged: Figures = {}
    for key in dict.fromkeys(key for figures in several for key in figures):
        values = [figures[key] for figures in several if figures.get(key) is not None]
        if values and all(isinstance(value, dict) for value in values):
            merged[key] = mean_figures(values)
        elif values and all(isinstance(value, int | float) for value in values):
            merged[key] = _mean(values)
        else:
            merged[key] = values[0] if values and all(value == values[0] for value in values) else None
    return merged


def _each_attribute(readings: Readings, subject: Subject) -> Figures:
    wanted = traits(subject.creature)
    return {key: _mean([seen[key] == value for seen in readings]) for key, value in wanted.items()}


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 5)
