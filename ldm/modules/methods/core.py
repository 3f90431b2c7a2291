"""Context regularisation in the text encoder (CoRe)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.methods.grid import Grid
from ldm.modules.methods.neti import NeTI
from ldm.modules.personalization import DenoiserShape, Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.util import UserError, check_integer, check_together

# None has a word for a background or style that an evaluation judges (benchmarks.methods_table checks it).
PROMPTS = (
    "{} in a garden with flowers",
    "{} next to a tall tree",
    "{} on a wooden table",
    "{} on a bed",
    "{} in a busy city street",
    "{} with a mountain behind it",
    "{} under a blue umbrella",
    "{} floating on water",
    "{} in the rain",
    "{} beside a red house",
    "{} in front of a brown wall",
    "{} with a purple and green pattern behind it",
    "{} and a small yellow ball",
    "{} and two white birds",
    "{} wearing a hat",
    "{} sitting on a chair",
    "{} holding a book",
    "{} running in a field",
    "{} seen from above",
    "{} made of glass",
    "{} made of gold",
    "{} on a plate",
    "{} as a puzzle on a floor",
    "{} cut out of paper",
    "{} as a doll in a window",
    "{} as a carpet on a wall",
    "{} in the style of a comic",
    "{} printed on a black shirt",
    "a clay figure of {} by a child",
    "a statue of {} in a park",
    "an old photo of {} in black and white",
    "a toy {} on an orange carpet",
)


class ContextRegularised:
    """Words that leave those around them as they are: context regularisation (Wu et al., AAAI 2025, 2408.15914).

    To the loss of a training step comes what the learned words do to the text encoder's outputs at the other words of
    some prompts: one minus their cosine with the outputs when the initializer stands there. It needs no image, and
    its prompts ask for none of the backgrounds and styles of `ldm.evaluation.edits`. Words that depend on timestep
    and layer are compared at a random timestep for each prompt, and in all layers.

    That is the first of the paper's two terms. The second, the distance of the other words' attention maps, is left
    out: a personalization is given neither the denoiser nor noisy latents, and taking attention weights out of layers
    that are fused, recomputed or compiled would be a seam through all of these, for two more passes of the denoiser in
    every step, one of them with gradient. In the paper's ablation it gains 0.008 of CLIP-T and loses 0.022 of DINO.

    Left out too is the scaling of the vectors in steps 120 to 180 of 300; `norm_control` of `EmbeddingManager` is
    similar. The weight here gives back most of the edits that eight vectors lose on the embedded model
    (benchmarks/results/methods_table.md); the paper's is 1.5e-4, on Stable Diffusion 2.

    A class of words is regularised by deriving from this class first: `class CoReGrid(ContextRegularised, Grid)`. Its
    files are those of the other class.

    Args:
        context_weight: weight of the mean over words.
        prompts_per_step: how many of the prompts a training step draws.
        prompts: with {} for the word; by default the 32 of this file.
        words: see the class that is regularised.
    Raises:
        UserError: a placeholder without initializer, a value that is not possible; and what that class raises.
    """

    # Of the class that is regularised.
    tokenizer: PromptTokenizer
    denoiser: DenoiserShape
    string_to_token_dict: dict[str, Tensor]
    timed: bool
    _counts: dict[str, int]
    _initializers: dict[str, str]

    def __init__(
        self,
        embedder: TextEncoder,
        context_weight: float = 0.05,
        prompts_per_step: int = 4,
        prompts: list[str] | None = None,
        **words: Any,
    ) -> None:
        check_integer(prompts_per_step, "personalization_config: prompts_per_step")
        if not context_weight >= 0:
            raise UserError(f"personalization_config: context_weight is {context_weight}; use 0 or more")
        self.context_weight, self.prompts_per_step = context_weight, prompts_per_step
        self.prompts = tuple(prompts or PROMPTS)
        check_together(context_weight=context_weight, prompts=self.prompts)
        super().__init__(embedder, **words)  # type: ignore[call-arg]
        self.adds_loss = self.context_weight > 0
        self._check_room()
        check_together(
            context_weight=context_weight,
            placeholder_strings=list(self._counts),
            initializer_words=[self._initializers.get(word) for word in self._counts],
        )

    def _check_room(self) -> None:
        """Raise UserError for a prompt that the vectors of a word leave no room after the word."""
        assert isinstance(self, Personalization)
        limit = self.tokenizer.max_length
        for string, text in self._initializers.items():
            count = max(self.most_positions()[string], len(self.tokenizer.token_ids(text)))
            for prompt in self.prompts:
                if 1 + len(self.tokenizer.token_ids(prompt.split("{}", 1)[0])) + count >= limit:
                    raise UserError(
                        f"personalization_config: {count} vectors of '{string}' fill the prompt '{prompt[:60]}' of at "
                        f"most {limit} tokens; use fewer vectors, or shorter prompts"
                    )

    def context_loss(self, embedder: TextEncoder) -> Tensor:
        """The weighted mean of one minus the cosine, over the other words of some prompts and over placeholders."""
        drawn = torch.randint(len(self.prompts), (self.prompts_per_step,), device="cpu").tolist()
        losses = [
            self._distance(embedder, string, [self.prompts[number] for number in drawn])
            for string in self._initializers
        ]
        return self.context_weight * torch.stack(losses).mean()

    def _distance(self, embedder: TextEncoder, string: str, prompts: list[str]) -> Tensor:
        assert isinstance(self, Personalization)
        tokenizer = self.tokenizer
        known, count = tokenizer.token_ids(self._initializers[string]), self.placeholders[string]
        rows: list[list[int]] = []
        theirs: list[list[int]] = []
        pairs: list[tuple[int, int, int]] = []
        for number, prompt in enumerate(prompts):
            before, after = (tokenizer.token_ids(part) for part in prompt.split("{}", 1))
            rows.append([*before, int(self.string_to_token_dict[string]), *after])
            theirs.append([*before, *known, *after])
            start = 1 + len(before)
            # Where a causal encoder cannot see the word, its outputs are equal and say nothing; the end counts.
            if not getattr(embedder, "causal", True):
                pairs += [(number, place, place) for place in range(start)]
            pairs += [
                (number, start + count + place, start + len(known) + place) for place in range(len(after) + 1)
            ]
        limit = tokenizer.max_length
        kept = [pair for pair in pairs if max(pair[1:]) < limit]
        which, ours_at, theirs_at = (list(column) for column in zip(*kept, strict=True))
        times = None
        if self.timed:
            times = torch.randint(self.denoiser.timesteps, (len(prompts),), device="cpu")
            times = times.to(embedder.device, non_blocking=True)
        ours = self.encode(embedder, self._ids(rows, embedder), times)
        if ours.ndim == 3:
            ours = ours[:, None, None]
        with torch.no_grad():
            reference = embedder.embed_ids(self._ids(theirs, embedder), None)
        ours, reference = ours[which, :, :, ours_at], reference[which, theirs_at][:, None, None]
        return (1 - torch.cosine_similarity(ours, reference, dim=-1)).mean()

    def _ids(self, rows: list[list[int]], embedder: TextEncoder) -> Tensor:
        """Tokens between start and end, padded to the encoder's length, [B, L]."""
        filled = [self.tokenizer.row(row) for row in rows]
        return torch.tensor(filled).to(embedder.device, non_blocking=True)


class CoRe(ContextRegularised, EmbeddingManager):
    """Vectors under context regularisation; see `ContextRegularised`. The files are ordinary vectors."""


class CoReGrid(ContextRegularised, Grid):
    """Vectors and residuals for each stage and layer under context regularisation."""


class CoReNeTI(ContextRegularised, NeTI):
    """The network of timestep and layer under context regularisation."""
