"""The evaluation of a model with an embedding on one concept: its prompts, the sampling, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import kornia
import torch
from PIL import Image
from torch import Tensor

from ldm.data.creatures.world import Creature
from ldm.evaluation import identity
from ldm.evaluation.appearance import palette_overlap
from ldm.evaluation.concepts import ConceptFolder, draw_creatures, other_creatures
from ldm.evaluation.edits import Edit, edits_of
from ldm.evaluation.identity import (
    CreatureReference,
    Figures,
    Gallery,
    Judge,
    StyleReference,
    style_test_creatures,
)
from ldm.evaluation.measures import (
    SCALE,
    STEPS,
    edit_figures,
    identity_figures,
    protocol_figures,
    similarity,
    without_placeholders,
)
from ldm.generate.images import check_settings, generate
from ldm.images import to_pil, to_tensor
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.features import Features
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


@dataclass(frozen=True)
class Sampling:
    """Settings for `ldm.generate.generate`, by default the paper's; raises UserError for invalid ones."""

    steps: int = STEPS
    scale: float = SCALE
    sampler: str = "ddim"
    seed: int = 42
    batch_size: int = 8
    precision: str = "full"

    def __post_init__(self) -> None:
        check_settings(
            self.steps,
            0.0,
            self.sampler,
            None,
            None,
            self.batch_size,
            self.precision,
            self.scale,
            self.seed,
        )

    def draw(
        self,
        model: LatentDiffusion,
        prompts: Sequence[str],
        count: int,
        done: Callable[[], object] | None = None,
    ) -> Iterator[list[Image.Image]]:
        """Yield `count` images of each prompt; every prompt starts from the same noise.

        As many prompts as fit into a batch are sampled together. `done` is called after each image.
        """

        def on_image(index: int, image: Image.Image) -> None:
            if done:
                done()

        prompts_at_once = max(1, self.batch_size // count)
        for first in range(0, len(prompts), prompts_at_once):
            chunk = prompts[first : first + prompts_at_once]
            images = generate(
                model,
                [prompt for prompt in chunk for _ in range(count)],
                numbers=[*range(count)] * len(chunk),
                steps=self.steps,
                scale=self.scale,
                sampler=self.sampler,
                seed=self.seed,
                batch_size=self.batch_size,
                precision=self.precision,
                on_image=on_image if done else None,
            )
            yield from (images[i * count :][:count] for i in range(len(chunk)))


_BATCH = 16


@torch.no_grad()
def reconstruct(model: LatentDiffusion, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode each image with the model's first stage, take the mode of the posterior, and decode it."""
    decoded = []
    for start in range(0, len(images), _BATCH):
        pixels = torch.stack([to_tensor(image) for image in images[start : start + _BATCH]])
        encoded = model.encode_first_stage(pixels.to(model.device, cast(torch.dtype, model.dtype)))
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.mode()
        decoded += [
            to_pil(pixels) for pixels in model.decode_first_stage(model.get_first_stage_encoding(encoded))
        ]
    return decoded


def psnr(images: Sequence[Image.Image], decoded: Sequence[Image.Image]) -> tuple[float, float]:
    """Return mean and standard deviation over images of the peak signal-to-noise ratio in dB."""
    values = torch.stack(
        [
            kornia.metrics.psnr(to_tensor(theirs), to_tensor(ours), max_val=2.0)
            for ours, theirs in zip(images, decoded, strict=True)
        ]
    )
    return values.mean().item(), values.std(correction=0).item()


LIKENESS, STYLE = "a photo of {}", "a painting in the style of {}"
REDRAWN, FIRST_STAGE, OTHERS = "redrawn", "redrawn, through the first stage", "other creatures"
SHOWN = 8  # images per prompt on the contact sheet
Rows = list[tuple[str, Sequence[Image.Image]]]


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt with "{}" for the concept, and the edit or style that its images should show."""

    prompt: str
    edit: Edit | None = None
    styled: StyleReference | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is the same for all concepts: model, sampling, judge and feature extractors.

    size: side of the model's images, at which references are rendered.
    """

    model: LatentDiffusion
    sampling: Sampling
    judge: Judge | None
    extractors: Sequence[Features]
    size: int
    _references: dict[tuple[Creature, str | None, str], CreatureReference] = field(default_factory=dict)

    @cached_property
    def gallery(self) -> Gallery:
        return Gallery.render(self.size, identity.GALLERY_SIZE)

    def creature_reference(
        self, creature: Creature, background: str | None = None, style: str = "photo"
    ) -> CreatureReference:
        """Return the creature's reference in a background and style; each is rendered once."""
        key = (creature, background, style)
        return self._references.setdefault(
            key, CreatureReference(creature, self.size, self.judge, background, style)
        )

    def measure(
        self,
        concept: ConceptFolder,
        prompts: Sequence[EvaluationPrompt],
        word: str,
        placeholders: Sequence[str],
        samples: int,
        done: Callable[[], object] | None = None,
    ) -> tuple[Figures, Rows]:
        """Generate `samples` images of each prompt; return the figures by prompt, and rows for a contact sheet.

        word: replaces "{}" in the prompts.
        placeholders: are removed from the text that CLIP-T compares with.
        done: is called after each image.
        """
        inputs = self._inputs(concept)
        figures: Figures = {}
        rows: Rows = []
        texts = [one.prompt.replace("{}", word) for one in prompts]
        drawn = self.sampling.draw(self.model, texts, samples, done)
        for one, text, images in zip(prompts, texts, drawn, strict=True):
            clip_text = without_placeholders(one.prompt.replace("{}", " "), placeholders)
            similarities = protocol_figures(self.extractors, images, inputs, clip_text)
            figures[text] = self._figures(one, concept, images) | {"features": similarities}
            rows.append((text, images[:SHOWN]))
        return figures, rows

    def measure_baselines(self, concept: ConceptFolder) -> tuple[Figures, Rows]:
        """Return the figures of a perfect model, of a perfect denoiser with this first stage, and of other creatures.

        Without a known creature there are none.
        """
        if concept.creature is None:
            return {}, []
        reference = self.creature_reference(concept.creature)
        others = other_creatures(SHOWN, unlike=concept.creature)
        rows: Rows = [
            (REDRAWN, reference.again),
            (FIRST_STAGE, reconstruct(self.model, reference.again)),
            (OTHERS, draw_creatures(others, self.size, take=4)),
        ]
        inputs = self._inputs(concept)
        figures: Figures = {}
        for name, images in rows:
            similarities = {
                features.name: {"clip_i": similarity(features.image(images), theirs)}
                for features, theirs in zip(self.extractors, inputs, strict=True)
            }
            figures[name] = identity_figures(images, reference, self.gallery) | {"features": similarities}
        return figures, rows

    def _inputs(self, concept: ConceptFolder) -> list[Tensor]:
        return [features.image(concept.images) for features in self.extractors]

    def _figures(
        self, prompt: EvaluationPrompt, concept: ConceptFolder, images: Sequence[Image.Image]
    ) -> Figures:
        if prompt.styled is not None:
            return prompt.styled.figures(images)
        if concept.creature is None:
            small = [image.resize(images[0].size, Image.Resampling.LANCZOS) for image in concept.images]
            return {"palette_overlap": round(palette_overlap(images, small), 5)}
        if prompt.edit is None:
            return identity_figures(images, self.creature_reference(concept.creature), self.gallery)
        reference = self.creature_reference(concept.creature, prompt.edit.background, prompt.edit.style)
        return edit_figures(prompt.edit, images, reference)


def evaluation_prompts(
    concept: ConceptFolder, more: Sequence[str], edits: bool, size: int, judge: Judge | None
) -> list[EvaluationPrompt]:
    """Return the prompts for a concept: one for its likeness, `more`, and `edits` where the truth is known.

    For a style, the edits are creatures of several species.
    """
    likeness = STYLE if concept.style else LIKENESS
    prompts = [EvaluationPrompt(prompt) for prompt in (likeness, *more)]
    if edits and concept.creature:
        prompts += [EvaluationPrompt(edit.prompt, edit=edit) for edit in edits_of(concept.creature)]
    if edits and concept.style:
        styled = [StyleReference(one, concept.style, size, judge) for one in style_test_creatures()]
        prompts += [EvaluationPrompt(one.prompt, styled=one) for one in styled]
    return list({one.prompt: one for one in prompts}.values())
