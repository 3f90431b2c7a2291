"""A model and an embedding evaluated on one concept: which prompts, how images are sampled, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import kornia
import torch
from PIL import Image
from torch import Tensor

from ldm.data.creatures.world import Creature
from ldm.evaluation import identity
from ldm.evaluation.appearance import palette_overlap
from ldm.evaluation.concepts import ConceptFolder, others, redrawn
from ldm.evaluation.edits import Edit, edits_of
from ldm.evaluation.identity import Gallery, Judge, StyledSubject, Subject, models_of_styles
from ldm.evaluation.measures import (
    SCALE,
    STEPS,
    Figures,
    edit_figures,
    identity_figures,
    protocol_figures,
    similarity,
    without_placeholders,
)
from ldm.generate.images import check_settings, generate
from ldm.images import to_pil, to_tensor
from ldm.models.features import Features
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`, by default those of the paper; UserError for what makes no sense."""

    steps: int = STEPS
    scale: float = SCALE
    sampler: str = "ddim"
    seed: int = 42
    batch_size: int = 8
    precision: str = "full"

    def __post_init__(self) -> None:
        check_settings(self.steps, 0.0, self.sampler, None, None, self.batch_size, self.precision)

    def draw(
        self, model: Any, prompts: Sequence[str], count: int, done: Callable[[], object] | None = None
    ) -> Iterator[list[Image.Image]]:
        """`count` pictures of each prompt in turn, all prompts from the same noises.

        As many prompts as fit into a batch are drawn together. `done` is called after each picture.
        """
        together = max(1, self.batch_size // count)
        for first in range(0, len(prompts), together):
            some = prompts[first : first + together]
            pictures = generate(
                model,
                [prompt for prompt in some for _ in range(count)],
                numbers=[*range(count)] * len(some),
                steps=self.steps,
                scale=self.scale,
                sampler=self.sampler,
                seed=self.seed,
                batch_size=self.batch_size,
                precision=self.precision,
                on_image=None if done is None else lambda place, picture: done(),
            )
            yield from (pictures[i * count :][:count] for i in range(len(some)))


_BATCH = 16


@torch.no_grad()
def reconstructed(model: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Each picture encoded, at the posterior's mode, and decoded again by the first stage of a LatentDiffusion."""
    found = []
    for start in range(0, len(pictures), _BATCH):
        pixels = torch.stack([to_tensor(one) for one in pictures[start : start + _BATCH]])
        encoded = model.encode_first_stage(pixels.to(model.device, model.dtype))
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.mode()
        found += [to_pil(one) for one in model.decode_first_stage(model.get_first_stage_encoding(encoded))]
    return found


def psnr(pictures: Sequence[Image.Image], found: Sequence[Image.Image]) -> tuple[float, float]:
    """Mean and standard deviation over pictures of the peak signal-to-noise ratio in dB."""
    values = torch.stack(
        [
            kornia.metrics.psnr(to_tensor(theirs), to_tensor(ours), max_val=2.0)
            for ours, theirs in zip(pictures, found, strict=True)
        ]
    )
    return values.mean().item(), values.std(correction=0).item()


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
        return Gallery.drawn(self.size, identity.AMONG)

    def subject(self, creature: Creature, background: str | None = None, style: str = "photo") -> Subject:
        """The creature in this sight, drawn once."""
        key = (creature, background, style)
        return self._subjects.setdefault(key, Subject(creature, self.size, self.judge, background, style))

    def ask(
        self,
        concept: ConceptFolder,
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

    def references(self, concept: ConceptFolder) -> tuple[Figures, Rows]:
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

    def _inputs(self, concept: ConceptFolder) -> list[Tensor]:
        return [features.image(concept.pictures) for features in self.extractors]

    def _seen(self, asked: Asked, concept: ConceptFolder, pictures: Sequence[Image.Image]) -> Figures:
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
    concept: ConceptFolder, prompts: Sequence[str], edits: bool, size: int, judge: Judge | None
) -> list[Asked]:
    """The prompts for a concept: its likeness, the user's own, and, where the truth is known, edits or species."""
    asked = [Asked(STYLE if concept.style else LIKENESS), *(Asked(prompt) for prompt in prompts)]
    if edits and concept.creature:
        asked += [Asked(edit.prompt, edit=edit) for edit in edits_of(concept.creature)]
    if edits and concept.style:
        styled = [StyledSubject(one, concept.style, size, judge) for one in models_of_styles()]
        asked += [Asked(subject.prompt, styled=subject) for subject in styled]
    return list({one.prompt: one for one in asked}.values())
