"""A warm start: before training, CLIP moves the vectors to where captions describe the training images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from PIL.Image import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from ldm.images import to_pil
from ldm.models.features import Features, load_features
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import place_after_insertion
from ldm.training.callbacks.base import datasets_of, personalization_of
from ldm.util import UserError, check_integer

logger = logging.getLogger(__name__)

# If the text encoder is the text tower of the given CLIP, the cosine of their features of these texts is 1 up to
# rounding. Two unrelated towers may agree on one text by chance, but not on all.
PROBES = ("a photo of a house beside a tree", "dog", "a painting of the sea in winter, oil on canvas", "7")
LEAST_AGREEMENT = 0.8


class WarmStart(Callback):
    """Trains the vectors with CLIP before the first training step, until captions describe their images to CLIP.

    Adam maximizes the cosine between CLIP's text features of captions and its image features of their images. The
    denoiser and the first stage are not used, so that the warm start, including loading CLIP, takes as long as one or
    two training steps of the embedded model. QuickEmbedding does the same for Stable Diffusion with 100 steps.

    CLIP's image tower is read from the text encoder's `image_tower`. Vectors from a file or a saved state are not
    changed. If the image tower, or a dataset that gives images and captions separately, is missing, or the
    personalization learns nothing before the text encoder, a warning explains why it begins unchanged. Where masks
    weight the loss, CLIP sees what they leave out fade to gray. The random numbers of the training do not change.

    Args:
        steps: the number of Adam steps.
        rate: Adam's initial learning rate, in standard deviations of the vocabulary's embeddings; it falls linearly
            to zero.
        captions: captions per step.
    """

    def __init__(self, steps: int = 8, rate: float = 2.0, captions: int = 8) -> None:
        super().__init__()
        check_integer(steps, "warm_start: steps")
        check_integer(captions, "warm_start: captions")
        if not rate > 0:
            raise UserError(f"warm_start: rate is {rate}; it must be above 0")
        self.steps, self.rate, self.captions = steps, rate, captions

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        manager = personalization_of(pl_module)
        if trainer.ckpt_path is not None or manager is None or manager.loaded:
            return
        if not list(manager.input_vectors()):
            logger.warning(
                "no warm start: %s learns no vectors before the text encoder", type(manager).__name__
            )
            return
        dataset = datasets_of(trainer).get("train")
        encoder, device = cast(TextEncoder, pl_module.cond_stage_model), trainer.strategy.root_device
        # The encoder's layers may already be in half precision.
        with _moved_to(device, encoder, manager), trainer.precision_plugin.train_step_context():
            try:
                features = features_of(encoder, dataset)
            except UserError as error:
                logger.warning("no warm start, the vectors keep their initial values: %s", error)
                return
            assert isinstance(encoder, FrozenCLIPEmbedder), "checked by features_of"
            first, last = self.train_vectors(encoder, manager, dataset, features)
        with torch.no_grad():
            for vectors in manager.input_vectors():
                vectors.copy_(trainer.strategy.broadcast(vectors.detach()))
        logger.info("warm start: cosine of captions and images %.2f, %.2f before", last, first)

    def train_vectors(
        self, encoder: FrozenCLIPEmbedder, manager: Personalization, dataset: Any, features: Features
    ) -> tuple[float, float]:
        """Train with CLIP; return the mean cosine of captions and images in the first and in the last step."""
        draws = [dataset.draw(index) for index in range(self.steps * self.captions)]
        # Read only the images that are drawn: the set may be large.
        rows = {variant: row for row, variant in enumerate(dict.fromkeys(one.variant for one in draws))}
        images = features.image([_shown(dataset, *variant) for variant in rows])
        table = encoder.token_embedding.weight
        images = images.to(table.device)
        optimizer = torch.optim.Adam(
            manager.input_vectors(), lr=self.rate * float(table.detach().float().std())
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        cosines: list[Tensor] = []
        for step in range(self.steps):
            drawn = draws[step * self.captions :][: self.captions]
            image_features = images[[rows[one.variant] for one in drawn]]
            states = end_states(encoder, manager, [one.caption for one in drawn])
            text_features = features.of_states(states)
            cosines.append((text_features * image_features).sum(dim=-1).mean())
            optimizer.zero_grad()
            (-cosines[-1]).backward()
            optimizer.step()
            schedule.step()
            manager.on_optimizer_step(0)
        optimizer.zero_grad()
        return float(cosines[0].detach()), float(cosines[-1].detach())


def _shown(dataset: Any, *variant: Any) -> Image:
    """The pixels of a variant, gray where masks leave out the loss."""
    pixels = dataset.image(*variant)
    weight = dataset.loss_weight(*variant) if hasattr(dataset, "loss_weight") else None
    return to_pil((pixels if weight is None else pixels * weight[..., None]).movedim(-1, 0))


def features_of(encoder: TextEncoder, dataset: Any) -> Features:
    """The two towers of the encoder's CLIP.

    Raises:
        UserError: the encoder is not CLIP's, its image tower cannot be read or belongs to another CLIP, or the
            dataset does not give images and captions separately.
    """
    if not isinstance(encoder, FrozenCLIPEmbedder):
        raise UserError(f"{type(encoder).__name__} has no image tower")
    source = encoder.image_tower
    if not all(hasattr(dataset, name) for name in ("draw", "image")):
        raise UserError(f"{type(dataset).__name__} does not give images and captions separately")
    features = load_features(source, encoder.token_embedding.weight.device, "image_tower")
    with torch.no_grad():
        ours = features.of_states(end_states(encoder, None, PROBES))
        theirs = cast(
            Tensor, features.text(PROBES)
        )  # None only for models without text, which of_states refuses
        agreement = float((ours.cpu() * theirs).sum(dim=-1).min())
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"image_tower '{source}' belongs to another CLIP than the text encoder (the cosine of their text features "
            f"is {agreement:.2f}); give the image tower of the same CLIP"
        )
    return features


def end_states(
    encoder: FrozenCLIPEmbedder, manager: Personalization | None, captions: Sequence[str]
) -> Tensor:
    """The encoder's states [B, d] at the end tokens of the captions, from which CLIP makes its text features."""
    ids = encoder.token_ids(captions, manager)
    ends = (ids == encoder.prompt_tokenizer.end_id).int().argmax(dim=1)
    if manager is not None:
        words = manager.string_to_token_dict
        widths = {int(words[word]): count for word, count in manager.placeholders.items()}
        ends = place_after_insertion(ids, ends, widths).clamp(max=ids.shape[1] - 1)
    # Encoding up to the last end token is enough, because CLIP's attention is causal.
    states = encoder.embed_ids(ids[:, : int(ends.max()) + 1], manager)
    return states[torch.arange(len(ids), device=ids.device), ends].float()


@contextmanager
def _moved_to(device: torch.device, encoder: TextEncoder, manager: Personalization) -> Iterator[None]:
    """Both on the device for this block: versions of Lightning move the model before or after on_fit_start."""
    home = encoder.token_embedding.weight.device
    modules = [cast(nn.Module, encoder), cast(nn.Module, manager)]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to(home)
