"""What a latent diffusion model does with its personalization: conditions, and the gradients of absent words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint import initialised
from ldm.model_kinds import ONLY_VECTORS
from ldm.models.diffusion.conditioning import (
    DiffusionWrapper,
    GuidedCondition,
    TimedCondition,
    TimedPrompts,
    condition_map,
    with_texts,
)
from ldm.modules.personalization import DenoiserShape, Personalization
from ldm.util import ConfigError, accepts, get_obj_from_str, instantiate_from_config

if TYPE_CHECKING:
    _Base = pl.LightningModule
else:
    _Base = object


class Personalised(_Base):
    """The part of `LatentDiffusion` that talks to its personalization, of which it never asks the class.

    Attributes:
        embedding_manager: the personalization, or None.
        cond_stage_model: the text encoder, where there is a personalization.
        model: the denoiser's wrapper.
    """

    embedding_manager: Personalization | None
    cond_stage_model: Any
    model: DiffusionWrapper
    num_timesteps: int
    embedding_reg_weight: float
    _captions_of_step: frozenset[str] = frozenset()

    def make_personalization(self, config: Mapping[str, Any]) -> Personalization:
        """Return the personalization of a node; ConfigError if it is none."""
        given: dict[str, Any] = {"embedder": self.cond_stage_model}
        if accepts(get_obj_from_str(config["target"]), "denoiser"):
            given["denoiser"] = self.denoiser_shape
        with initialised():  # a base checkpoint does not hold what is learned here
            personalization = instantiate_from_config(config, **given)
        if not isinstance(personalization, Personalization):
            raise ConfigError(
                f"personalization_config: {config['target']} is no Personalization; derive it from the class in "
                "ldm/modules/personalization.py"
            )
        more = personalization.shapes_context or personalization.adds_loss
        if more and len(self.cond_stage_model.widths) > 1:
            raise ConfigError(f"personalization_config: {config['target']} {ONLY_VECTORS}")
        unmeasured = (
            type(personalization).embedding_to_coarse_loss is Personalization.embedding_to_coarse_loss
        )
        if self.embedding_reg_weight > 0 and unmeasured:
            raise ConfigError(
                f"embedding_reg_weight is {self.embedding_reg_weight:g}, and {config['target']} has no distance from "
                "its initializers; set it to 0"
            )
        return personalization

    @property
    def denoiser_shape(self) -> DenoiserShape:
        """What a personalization may know of the denoiser."""
        layers = getattr(self.model.diffusion_model, "layer_names", ())
        return DenoiserShape(tuple(layers), self.num_timesteps)

    def get_learned_conditioning(self, c: Any) -> Any:
        """Return a condition encoded."""
        raise NotImplementedError

    def training_condition(self, c: Any) -> Any:
        """Return a condition encoded as a training step needs it: guided, if the personalization is trained so."""
        encoded, scale = self.get_learned_conditioning(c), self.guidance_in_training
        if scale == 1.0:
            return encoded
        negatives = with_texts(c, self.negative_prompts(c))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._holds_words(negatives)):
            return GuidedCondition(encoded, self.get_learned_conditioning(negatives), scale)

    @property
    def guidance_in_training(self) -> float:
        """The scale at which a training step is guided; 1 is no guidance."""
        return 1.0 if self.embedding_manager is None else self.embedding_manager.training_guidance

    def _holds_words(self, prompts: Sequence[str]) -> bool:
        words = () if self.embedding_manager is None else self.embedding_manager.placeholders
        return bool(self.cond_stage_model.prompt_tokenizer.found(prompts, words))

    def negative_prompts(self, prompts: Sequence[str], negative: str = "") -> list[str]:
        """Return what guidance steers away from under each prompt: `negative`, and what the personalization adds."""
        if self.embedding_manager is None:
            return [negative] * len(prompts)
        return [self.embedding_manager.negative_prompt(negative, prompt) for prompt in prompts]

    def _encode_captions(self, captions: Any) -> Any:
        """Encode equal captions of a batch once, and repeat their rows."""
        personalization, shaped = self.embedding_manager, False
        if personalization is not None and personalization.shapes_context:
            # A training step keeps the graph of words that its captions lack, as backward and DDP need it.
            shaped = torch.is_grad_enabled() or not isinstance(captions, (list, tuple))
            shaped = shaped or self._holds_words(captions)
            if shaped and personalization.timed:
                return TimedCondition([TimedPrompts(captions, self._encode_shaped, personalization.stage_of)])
        unique = list(dict.fromkeys(captions)) if isinstance(captions, (list, tuple)) else captions
        if shaped:
            encoded = self._encode_shaped(unique)
        else:
            encoded = self.cond_stage_model.encode(unique, embedding_manager=personalization)
        if len(unique) == len(captions):
            return encoded
        rows = torch.tensor([unique.index(caption) for caption in captions])
        # Do not wait for the device, which may still compute earlier steps.
        rows = rows.to(self.device, non_blocking=True)
        return condition_map(lambda part: part.index_select(0, rows), encoded)

    def _encode_shaped(self, captions: Sequence[str], times: Tensor | None = None) -> Tensor:
        """Encode captions as the personalization does, at timesteps [B]."""
        assert self.embedding_manager is not None
        ids = self.cond_stage_model.token_ids(captions, self.embedding_manager)
        return self.embedding_manager.encode(self.cond_stage_model, ids, times)

    def note_captions(self, captions: Any) -> None:
        """Remember the texts that a training step encodes, for `on_before_optimizer_step`."""
        if self.training and self.embedding_manager is not None and isinstance(captions, list):
            self._captions_of_step |= frozenset(captions)
            if self.guidance_in_training != 1:
                self._captions_of_step |= frozenset(self.negative_prompts(captions))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of words that no caption of the step holds, so that no momentum or decay moves them.

        Each of several concepts is so trained as it would be without the images of the others.
        """
        captions, self._captions_of_step = self._captions_of_step, frozenset()
        if self.embedding_manager is None or not captions:
            return
        parameters = list(self.embedding_manager.embedding_parameters())
        if len(parameters) < 2:
            return
        absent = {id(parameter) for parameter in self.embedding_manager.absent_parameters(captions)}
        if self.trainer.world_size > 1:  # captions of other processes have gradients here too
            present = [id(parameter) not in absent for parameter in parameters]
            seen = torch.tensor(present, dtype=torch.int32, device=self.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            absent = {id(p) for p, there in zip(parameters, seen.tolist(), strict=True) if not there}
        for parameter in parameters:
            if id(parameter) in absent:
                parameter.grad = None
