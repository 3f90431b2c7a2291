"""How first stages are trained: a generator and, if the loss has one, a discriminator in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoint import load_state, read_state_dict
from ldm.models.optim import build_optimizer
from ldm.util import instantiate_from_config, pretrained_wanted

# What first stages with an adversary are trained with (Esser et al. 2021).
ADAM = {"target": "torch.optim.Adam", "params": {"betas": [0.5, 0.9]}}


class FirstStageTraining(pl.LightningModule):
    """Training of an encoder and decoder by the loss that the node `lossconfig` describes.

    Sub-classes own `encoder`, `decoder` and a forward that returns the reconstruction and what the loss needs
    beside it. Optimisation is manual because two optimisers may alternate; only the generator's steps count as
    `global_step`. `scheduler_config` and `optimizer_config` are nodes, see `ldm.models.optim`; `lr_g_factor`
    multiplies the learning rate of all but the discriminator.
    """

    def __init__(
        self,
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        optimizer_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image_key = image_key
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config or ADAM
        self.lr_g_factor = lr_g_factor
        self.loss = instantiate_from_config(lossconfig)

    def init_from_ckpt(self, path: str | None, ignore_keys: Sequence[str] = ()) -> None:
        """Start from the weights of a checkpoint, without keys that begin with one of `ignore_keys`."""
        if path is None or not pretrained_wanted():
            return
        state = {
            key: value
            for key, value in read_state_dict(path).items()
            if not key.startswith(tuple(ignore_keys) + ("loss.",))
        }
        load_state(self, state, source=f"first stage '{path}'", filled=("loss.", *ignore_keys))

    def get_input(self, batch: Mapping[str, Any], key: str | None = None) -> Tensor:
        """Pictures [B, 3, H, W] of a batch that holds [B, H, W, 3]."""
        x = batch[key or self.image_key]
        x = x[..., None] if x.ndim == 3 else x
        return x.movedim(-1, 1).to(self.device, torch.float32, memory_format=torch.contiguous_format)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        x = self.get_input(batch)
        optimizers = self.optimizers()
        generator, *adversary = optimizers if isinstance(optimizers, list) else [optimizers]
        reconstruction, detail = self(x)
        loss, parts = self.loss(x, reconstruction, detail, self.global_step, self.decoder.last_layer)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        if adversary and self.loss.discriminator_active(self.global_step):
            disc_loss = self.loss.discriminate(x, reconstruction)
            adversary[0].zero_grad()
            self.manual_backward(disc_loss)
            # Not through `adversary[0].step()`, which would count the batch as two steps.
            precision = self.trainer.precision_plugin
            precision.optimizer_step(adversary[0].optimizer, model=self, closure=lambda: None)
            parts["disc_loss"] = disc_loss.detach()
        for scheduler in self._schedulers():
            scheduler.step()
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        self.log("loss", parts["rec_loss"], prog_bar=True, logger=False)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss's parts and the PSNR in dB of pictures in [-1, 1]."""
        x = self.get_input(batch)
        reconstruction, detail = self(x)
        _, parts = self.loss(x, reconstruction, detail, self.global_step, self.decoder.last_layer)
        error = (reconstruction.clamp(-1, 1) - x).pow(2).flatten(1).mean(dim=1)
        parts["psnr"] = (10 * torch.log10(4.0 / error)).mean()
        self.log_dict({f"val/{name}": value for name, value in parts.items()}, batch_size=x.shape[0])

    def configure_optimizers(self) -> Any:
        adversary = list(self.loss.discriminator.parameters()) if hasattr(self.loss, "discriminator") else []
        others = {id(parameter) for parameter in adversary}
        generator = [p for p in self.parameters() if p.requires_grad and id(p) not in others]
        parts = [(generator, self.learning_rate * self.lr_g_factor), (adversary, self.learning_rate)]
        built = [
            build_optimizer([{"params": params}], rate, self.optimizer_config, self.scheduler_config)
            for params, rate in parts
            if params
        ]
        if self.scheduler_config is None:
            return built
        return [part["optimizer"] for part in built], [part["lr_scheduler"] for part in built]

    def _schedulers(self) -> list[Any]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **unused: Any) -> dict[str, Tensor]:
        """Pictures and reconstructions [N, 3, H, W] in [-1, 1]."""
        x = self.get_input(batch)[:N]
        reconstruction, _ = self(x)
        return {"inputs": x, "reconstruction": reconstruction}
