"""The figures of the images of one prompt: dicts of plain numbers, as they are written to JSON."""

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
    AttributePredictions,
    CreatureReference,
    Figures,
    Gallery,
    attribute_agreement,
    creature_attributes,
    likeness,
    predict_attributes,
)
from ldm.models.features import Features
from ldm.words import pattern

# Images per prompt, DDIM steps and guidance scale of the paper's evaluation.
SAMPLES, STEPS, SCALE = 64, 50, 5.0


def similarity(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Return the similarity of unit features [N, d] and [M, d] by two definitions, each -1 to 1.

    "pairwise" is the mean cosine over all pairs, as in the original's code. "averaged" is the cosine of the averaged
    features, as in the paper's text; where it is positive, it is the larger one.
    """
    return {
        "pairwise": float((ours @ theirs.T).mean()),
        "averaged": float(F.cosine_similarity(ours.mean(0), theirs.mean(0), dim=0)),
    }


def without_placeholders(prompt: str, placeholders: Iterable[str]) -> str:
    """Return the text for CLIP-T: "a photo of * on the moon" becomes "a photo of on the moon"."""
    for name in sorted(placeholders, key=len, reverse=True):
        prompt = re.sub(pattern(name), " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())


def identity_figures(
    images: Sequence[Image.Image], reference: CreatureReference, gallery: Gallery | None = None
) -> Figures:
    """Return the likeness to a creature: its parts, the raw and calibrated score, and ranks if there is a gallery.

    `attributes` (the mean) and `attribute` (by attribute) are included if the reference has a judge.
    """
    features, predictions = (
        AppearanceFeatures.from_images(images),
        predict_attributes(reference.judge, images),
    )
    raw = likeness(features, predictions, reference.truth, reference.creature)
    calibrated = reference.calibrated(raw)
    figures: Figures = {
        "palette_overlap": _mean(features.palette_overlap(reference.truth)),
        "silhouette": _mean(features.shape_overlap(reference.truth)),
        "color_distance": _mean(features.color_distance(reference.truth)),
        "likeness": _mean(raw),
        "identity": _mean(calibrated),
        "itself": _mean(calibrated > ITSELF),
    }
    if predictions is not None:
        figures["attributes"] = _mean(attribute_agreement(predictions, reference.creature))
        figures["attribute"] = _each_attribute(predictions, reference)
    if gallery is not None:
        ranks = gallery.ranks(features, predictions, reference)
        figures |= {"retrieved": _mean(ranks == 1), "rank": _mean(ranks), "among": len(gallery.creatures)}
    return figures


def edit_figures(edit: Edit, images: Sequence[Image.Image], reference: CreatureReference) -> Figures:
    """Return how many images show what an edit asks for, still show the creature, and both.

    reference: the creature in the edit's background and style. Without a judge, `obeyed` and `both` are None except
        for plain backgrounds.
    """
    predictions = predict_attributes(reference.judge, images)
    calibrated = reference.calibrated(
        likeness(AppearanceFeatures.from_images(images), predictions, reference.truth, reference.creature)
    )
    shown, itself = obeyed(edit, images, predictions), calibrated > ITSELF
    return {
        "asks_for": f"{edit.attribute}: {edit.value}",
        "group": edit.group,
        "obeyed": None if shown is None else _mean(shown),
        "itself": _mean(itself),
        "both": None if shown is None else _mean(shown & itself),
        "identity": _mean(calibrated),
    }


def protocol_figures(
    extractors: Sequence[Features],
    images: Sequence[Image.Image],
    inputs: Sequence[Tensor],
    text: str,
) -> Figures:
    """Return CLIP-I against the concept's images and CLIP-T against `text`, by the name of each extractor.

    inputs: the features of the concept's images, [M, d] for each extractor. An extractor without a text encoder has
        no CLIP-T.
    """
    figures: Figures = {}
    for extractor, theirs in zip(extractors, inputs, strict=True):
        ours, words = extractor.image(images), extractor.text([text])
        figures[extractor.name] = {"clip_i": similarity(ours, theirs)}
        if words is not None:
            figures[extractor.name]["clip_t"] = similarity(ours, words)
    return figures


def mean_figures(several: Sequence[Figures]) -> Figures:
    """Return the mean of each number over the dicts that have it, recursively; other values stay if all are equal."""
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


def _each_attribute(predictions: AttributePredictions, reference: CreatureReference) -> Figures:
    expected = creature_attributes(reference.creature)
    return {key: _mean([one[key] == value for one in predictions]) for key, value in expected.items()}


def _mean(values: Any) -> float:
    return round(float(np.mean(values)), 5)
