"""Scores of learned vectors by `ldm.evaluation`: likeness to the concept, and edits obeyed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.edits import edits_of
from ldm.evaluation.evaluate import reconstruct
from ldm.evaluation.identity import CreatureReference, Judge
from ldm.evaluation.measures import edit_figures, identity_figures
from ldm.generate import generate
from ldm.generate.embeddings import load_embeddings
from ldm.util import UserError

PLAIN = "a photo of *"
SEED = 7


def creatures(folder: Path) -> list[Path]:
    """Return the folders of concepts that are creatures, which can be rendered again for comparison."""
    return [
        path.parent for path in sorted(folder.glob("*/concept.json")) if read_concept(path.parent).creature
    ]


def check_creatures(folders: Iterable[Path]) -> None:
    """Raise UserError for a folder that holds no creature of which the truth is known, and for two of one name."""
    names: set[str] = set()
    for folder in folders:
        if folder.name in names:
            raise UserError(f"two folders of --concepts are named '{folder.name}'; rename one")
        names.add(folder.name)
        if read_concept(folder).creature is None:
            raise UserError(
                f"'{folder}' is no creature of the world of creatures; --concepts takes these alone"
            )


class Scorer:
    """Generate images with learned vectors, always from the same noise, and score them.

    images: number of images for an identity.
    edit_images: number of images for each edit.
    steps: steps of DPM-Solver++.

    Attributes:
        dials: at which images are generated; see `Personalization.dials`.
    """

    def __init__(
        self, model: Any, judge: Judge | None, images: int = 16, edit_images: int = 4, steps: int = 25
    ) -> None:
        self.model, self.judge, self.steps = model, judge, steps
        self.images, self.edit_images = images, edit_images
        self.dials: dict[str, float] = {}

    def identity(self, vectors: Path, concept: ConceptFolder) -> float:
        """Return the calibrated identity: 0 is another creature, 1 the same one rendered again."""
        return float(self.likeness(vectors, concept)["identity"])

    def likeness(self, vectors: Path | None, concept: ConceptFolder, word: str = "*") -> dict[str, Any]:
        """Return all figures of the likeness; see `ldm.evaluation.measures.identity_figures`.

        Without `vectors`, `word` is a description in ordinary words.
        """
        drawn = self._generate(vectors, [PLAIN.replace("*", word)] * self.images)
        return identity_figures(drawn, self._reference(concept.creature, drawn[0].width))

    def through_first_stage(self, concept: ConceptFolder) -> dict[str, Any]:
        """Return the figures of a perfect denoiser: of renderings through the model's first stage."""
        reference = self._reference(concept.creature, concept.images[0].width)
        return identity_figures(reconstruct(self.model, reference.again), reference)

    def editability(self, vectors: Path | None, concept: ConceptFolder, word: str = "*") -> float:
        """Return the share of edited images that show what was asked for and still the creature.

        As far as possible, no training image has a background that is asked for.
        """
        edits, count = edits_of(concept.creature, concept.backgrounds), self.edit_images
        drawn = self._generate(vectors, [edit.prompt.format(word) for edit in edits for _ in range(count)])
        shares = []
        for index, edit in enumerate(edits):
            reference = self._reference(concept.creature, drawn[0].width, edit.background, edit.style)
            shares.append(edit_figures(edit, drawn[index * count :][:count], reference)["both"])
        return float(np.mean([share for share in shares if share is not None]))

    @cache  # noqa: B019  (a scorer lives as long as the benchmark)
    def _reference(
        self, creature: Any, size: int, background: str | None = None, style: str = "photo"
    ) -> CreatureReference:
        return CreatureReference(creature, size, self.judge, background, style)

    def _generate(self, vectors: Path | None, prompts: Sequence[str]) -> list[Any]:
        if vectors is not None:
            load_embeddings(self.model, [vectors])
        options: dict[str, Any] = {
            "steps": self.steps,
            "scale": 3.0,
            "sampler": "dpm_solver",
            "seed": SEED,
            "batch_size": 16,
        }
        return generate(self.model, prompts, dials=self.dials, **options)
