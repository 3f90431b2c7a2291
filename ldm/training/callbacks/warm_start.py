"""Vectors that begin where CLIP sees the pictures, instead of at a word that comes near them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.images import to_pil
from ldm.models.features import Features, load_features
from ldm.modules.embedding_manager import place_after_insertion
from ldm.util import UserError

logger = logging.getLogger(__name__)

# The encoder and the text tower of the same CLIP agree by 1 about each of these, rounding apart; by chance two
# strangers agree about one of them, not about all.
PROBES = ("a photo of a house beside a tree", "dog", "a painting of the sea in winter, oil on canvas", "7")
LEAST_AGREEMENT = 0.8


class WarmStart(Callback):
    """Moves the vectors, before the first training step, to where captions mean to CLIP what the pictures show.

    The text features of `captions` drawn captions at a time approach the features of their pictures, by the cosine,
    in `steps` steps of Adam. Its rate falls linearly from `rate`, in standard deviations of the vocabulary's
    embeddings, to zero. Neither denoiser nor first stage takes part, so that all of it, the reading of the towers
    included, takes as long as two or three training steps of the embedded model. QuickEmbedding starts Stable
    Diffusion so, with 100 steps.

    The picture tower is what the text encoder names as `image_tower`. Vectors that come from a file or a state stay
    as they are; without pictures apart from their captions, or the picture tower of the encoder's own CLIP at hand, a
    line says why they begin at their initializers. No random numbers are taken from the training.
    """

    def __init__(self, steps: int = 15, rate: float = 1.25, captions: int = 8) -> None:
        super().__init__()
        for name, number in (("steps", steps), ("captions", captions)):
            if not isinstance(number, int) or number < 1:
                raise UserError(f"warm_start: {name} is {number!r}; it must be a whole number from 1 on")
        if not rate > 0:
            raise UserError(f"warm_start: rate is {rate}; it must be above 0")
        self.steps, self.rate, self.captions = steps, rate, captions

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        manager = getattr(pl_module, "embedding_manager", None)
        if trainer.ckpt_path is not None or manager is None or getattr(manager, "loaded", False):
            return
        dataset = getattr(trainer.datamodule, "datasets", {}).get("train")
        encoder, device = pl_module.cond_stage_model, trainer.strategy.root_device
        # The encoder's layers may lie in half precision already.
        with _on(device, encoder, manager), trainer.precision_plugin.train_step_context():
            try:
                features = features_of(encoder, dataset)
            except UserError as error:
                logger.warning("no warm start, the vectors begin at their initializers: %s", error)
                return
            first, last = self.approach(encoder, manager, dataset, features)
        with torch.no_grad():
            for vectors in manager.embedding_parameters():
                vectors.copy_(trainer.strategy.broadcast(vectors.detach()))
        logger.info("warm start: captions and pictures agree by %.2f, %.2f before", last, first)

    def approach(self, encoder: Any, manager: Any, dataset: Any, features: Features) -> tuple[float, float]:
        """Learn from CLIP alone; returns the mean cosine of captions and pictures in the first and the last step."""
        draws = [dataset.draw(index) for index in range(self.steps * self.captions)]
        # Of a large set only what is drawn is read.
        rows = {variant: row for row, variant in enumerate(dict.fromkeys(one.variant for one in draws))}
        pictures = features.image([to_pil(dataset.image(*variant).movedim(-1, 0)) for variant in rows])
        table = encoder.token_embedding.weight
        pictures = pictures.to(table.device)
        optimizer = torch.optim.Adam(
            manager.embedding_parameters(), lr=self.rate * float(table.detach().float().std())
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        cosines: list[Tensor] = []
        for step in range(self.steps):
            drawn = draws[step * self.captions :][: self.captions]
            shown = pictures[[rows[one.variant] for one in drawn]]
            said = features.of_states(end_states(encoder, manager, [one.caption for one in drawn]))
            cosines.append((said * shown).sum(dim=-1).mean())
            optimizer.zero_grad()
            (-cosines[-1]).backward()
            optimizer.step()
            schedule.step()
            manager.on_optimizer_step(0)
        optimizer.zero_grad()
        return float(cosines[0].detach()), float(cosines[-1].detach())


def features_of(encoder: Any, dataset: Any) -> Features:
    """The two towers of the encoder's CLIP; UserError where they, or pictures for them, are not to be had."""
    source = getattr(encoder, "image_tower", None)
    if source is None:
        raise UserError(f"{type(encoder).__name__} has no picture tower")
    if not all(hasattr(dataset, name) for name in ("draw", "image")):
        raise UserError(f"{type(dataset).__name__} does not give pictures and captions apart")
    features = load_features(source, encoder.token_embedding.weight.device, "image_tower")
    with torch.no_grad():
        ours = features.of_states(end_states(encoder, None, PROBES))
        agreement = float((ours.cpu() * features.text(PROBES)).sum(dim=-1).min())
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"image_tower '{source}' is of another CLIP than the text encoder (about a caption they agree by "
            f"{agreement:.2f}); name the picture tower of the same one"
        )
    return features


def end_states(encoder: Any, manager: Any, captions: Sequence[str]) -> Tensor:
    """The encoder's states [B, d] at the captions' ends, which CLIP makes its text features of."""
    ids = encoder.token_ids(captions, manager)
    ends = (ids == encoder.prompt_tokenizer.end_id).int().argmax(dim=1)
    if manager is not None:
        words = manager.string_to_token_dict
        widths = {int(words[word]): count for word, count in manager.placeholders.items()}
        ends = place_after_insertion(ids, ends, widths).clamp(max=ids.shape[1] - 1)
    # What follows the ends changes nothing before it.
    states = encoder.embed_ids(ids[:, : int(ends.max()) + 1], manager)
    return states[torch.arange(len(ids), device=ids.device), ends].float()


@contextmanager
def _on(device: torch.device, encoder: Any, manager: Any) -> Iterator[None]:
    """Both on the device, and where they were again: Lightning moves the model at a time that versions differ in."""
    home = encoder.token_embedding.weight.device
    for module in (encoder, manager):
        module.to(device)
    try:
        yield
    finally:
        for module in (encoder, manager):
            module.to(home)
