"""A model and an embedding on one concept: what it is asked to draw, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.data.creatures.world import Creature
from ldm.evaluation import retrieval
from ldm.evaluation.concept import Concept
from ldm.evaluation.drawings import others, redrawn
from ldm.evaluation.edits import Edit, edits_of
from ldm.evaluation.identity import Judge, Subject
from ldm.evaluation.measures import Figures, edit_figures, identity_figures, protocol_figures
from ldm.evaluation.palette import palette_overlap
from ldm.evaluation.protocol import similarity, without_placeholders
from ldm.evaluation.reconstruction import reconstructed
from ldm.evaluation.retrieval import Gallery
from ldm.evaluation.sampling import Sampling
from ldm.evaluation.styles import StyledSubject, models_of_styles
from ldm.models.features import Features

LIKENESS, STYLE = "a photo of {}", "a painting in the style of {}"
REDRAWN, FIRST_STAGE, OTHERS = "redrawn", "redrawn, through the first stage", "other creatures"
SHOWN = 8  # pictures of a prompt on the sheet
Rows = list[tuple[str, Sequence[Image.Image]]]


@dataclass(frozen=True)
class Asked:
    """A prompt with "{}" for the concept, and what is known of how its pictures should look."""

    prompt: str
    edit: Edit | None = None
    styled: StyledSubject | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that stays the same from concept to concept; `size` is the side of the model's pictures."""

    model: Any
    sampling: Sampling
    judge: Judge | None
    extractors: Sequence[Features]
    size: int
    _subjects: dict[Any, Subject] = field(default_factory=dict)

    @cached_property
    def gallery(self) -> Gallery:
        return Gallery.drawn(self.size, retrieval.AMONG)

    def subject(self, creature: Creature, background: str | None = None, style: str = "photo") -> Subject:
        """The creature in this sight, drawn once."""
        key = (creature, background, style)
        return self._subjects.setdefault(key, Subject(creature, self.size, self.judge, background, style))

    def ask(
        self,
        concept: Concept,
        asked: Sequence[Asked],
        word: str,
        placeholders: Sequence[str],
        samples: int,
        done: Callable[[], object] | None = None,
    ) -> tuple[Figures, Rows]:
        """Figures by prompt, and rows for a sheet; `word` is written for "{}"."""
        inputs = self._inputs(concept)
        figures: Figures = {}
        rows: Rows = []
        prompts = [one.prompt.replace("{}", word) for one in asked]
        drawn = self.sampling.draw(self.model, prompts, samples, done)
        for one, prompt, pictures in zip(asked, prompts, drawn, strict=True):
            text = without_placeholders(one.prompt.replace("{}", " "), placeholders)
            found = protocol_figures(self.extractors, pictures, inputs, text)
            figures[prompt] = self._seen(one, concept, pictures) | {"features": found}
            rows.append((prompt, pictures[:SHOWN]))
        return figures, rows

    def references(self, concept: Concept) -> tuple[Figures, Rows]:
        """What likeness to a creature is at best, through the first stage at best, and by chance."""
        if concept.creature is None:
            return {}, []
        subject = self.subject(concept.creature)
        strangers = others(SHOWN, unlike=concept.creature)
        rows: Rows = [
            (REDRAWN, subject.again),
            (FIRST_STAGE, reconstructed(self.model, subject.again)),
            (OTHERS, redrawn(strangers, self.size, take=4)),
        ]
        inputs, figures = self._inputs(concept), {}
        for name, pictures in rows:
            found = {
                features.name: {"clip_i": similarity(features.image(pictures), theirs)}
                for features, theirs in zip(self.extractors, inputs, strict=True)
            }
            figures[name] = identity_figures(pictures, subject, self.gallery) | {"features": found}
        return figures, rows

    def _inputs(self, concept: Concept) -> list[Tensor]:
        return [features.image(concept.pictures) for features in self.extractors]

    def _seen(self, asked: Asked, concept: Concept, pictures: Sequence[Image.Image]) -> Figures:
        if asked.styled is not None:
            return asked.styled.figures(pictures)
        if concept.creature is None:
            small = [one.resize(pictures[0].size, Image.Resampling.LANCZOS) for one in concept.pictures]
            return {"palette_overlap": round(palette_overlap(pictures, small), 5)}
        if asked.edit is None:
            return identity_figures(pictures, self.subject(concept.creature), self.gallery)
        there = self.subject(concept.creature, asked.edit.background, asked.edit.style)
        return edit_figures(asked.edit, pictures, there)


def what_to_ask(
    concept: Concept, prompts: Sequence[str], edits: bool, size: int, judge: Judge | None
) -> list[Asked]:
    """The prompts for a concept: its likeness, the user's own, and, where the truth is known, edits or species."""
    asked = [Asked(STYLE if concept.style else LIKENESS), *(Asked(prompt) for prompt in prompts)]
    if edits and concept.creature:
        asked += [Asked(edit.prompt, edit=edit) for edit in edits_of(concept.creature)]
    if edits and concept.style:
        styled = [StyledSubject(one, concept.style, size, judge) for one in models_of_styles()]
        asked += [Asked(subject.prompt, styled=subject) for subject in styled]
    return list({one.prompt: one for one in asked}.values())
