"""How good vectors are by the evaluation of `ldm.evaluation`: is it the concept, and does it obey an edit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.edits import edits_of
from ldm.evaluation.identity import Judge, Subject
from ldm.evaluation.measures import edit_figures, identity_figures
from ldm.generate import generate
from ldm.generate.embeddings import load_embeddings

PLAIN = "a photo of *"
SEED = 7


def creatures(folder: Path) -> list[Path]:
    """The concepts in a folder of concepts that are creatures, which can be drawn again to compare with."""
    return [
        path.parent for path in sorted(folder.glob("*/concept.json")) if read_concept(path.parent).creature
    ]


class Scorer:
    """Draws pictures with vectors and scores them, always from the same noise.

    `pictures` are drawn for an identity, `edit_pictures` for each edit, in `steps` of DPM-Solver++.
    """

    def __init__(
        self, model: Any, judge: Judge | None, pictures: int = 16, edit_pictures: int = 4, steps: int = 25
    ) -> None:
        self.model, self.judge, self.steps = model, judge, steps
        self.pictures, self.edit_pictures = pictures, edit_pictures

    def identity(self, vectors: Path, concept: ConceptFolder) -> float:
        """The calibrated identity: 0 is another creature, 1 the same one drawn again."""
        drawn = self._draw(vectors, [PLAIN] * self.pictures)
        return float(identity_figures(drawn, self._subject(concept.creature, drawn[0].width))["identity"])

    def editability(self, vectors: Path, concept: ConceptFolder) -> float:
        """The share of edited pictures that show what was asked for and are still the creature."""
        edits, count = edits_of(concept.creature), self.edit_pictures
        drawn = self._draw(vectors, [edit.prompt.format("*") for edit in edits for _ in range(count)])
        found = []
        for index, edit in enumerate(edits):
            subject = self._subject(concept.creature, drawn[0].width, edit.background, edit.style)
            found.append(edit_figures(edit, drawn[index * count :][:count], subject)["both"])
        return float(np.mean([share for share in found if share is not None]))

    @cache  # noqa: B019  (a scorer lives as long as the benchmark)
    def _subject(
        self, creature: Any, size: int, background: str | None = None, style: str = "photo"
    ) -> Subject:
        return Subject(creature, size, self.judge, background, style)

    def _draw(self, vectors: Path, prompts: Sequence[str]) -> list[Any]:
        load_embeddings(self.model, [vectors])
        return generate(
            self.model, prompts, steps=self.steps, scale=3.0, sampler="dpm_solver", seed=SEED, batch_size=16
        )
