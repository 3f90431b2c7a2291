"""Reconstruction losses of first stages: pixels, optionally perception and an adversary (Esser et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.discriminator import NLayerDiscriminator, adaptive_weight, hinge_loss, vanilla_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.util import ConfigError

_DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


class _AdversarialLoss(nn.Module):
    """What KL and VQ losses share: the reconstruction term and the discriminator's two sides.

    `perceptual_weight` > 0 needs `perceptual_ckpt`; `disc_weight` > 0 trains an adversary from step `disc_start`.
    `mse_weight` adds squared error to the absolute one.
    """

    def __init__(
        self,
        disc_start: int = 0,
        pixelloss_weight: float = 1.0,
        mse_weight: float = 0.0,
        perceptual_weight: float = 1.0,
        perceptual_ckpt: str | None = None,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        disc_loss: str = "hinge",
    ) -> None:
        super().__init__()
        if disc_loss not in _DISCRIMINATOR_LOSSES:
            raise ConfigError(f"disc_loss '{disc_loss}' is unknown; use {' or '.join(_DISCRIMINATOR_LOSSES)}")
        self.disc_start = disc_start
        self.pixel_weight = pixelloss_weight
        self.mse_weight = mse_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(perceptual_ckpt) if perceptual_weight > 0 else None
        self.disc_weight = disc_weight * disc_factor
        if self.disc_weight > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, n_layers=disc_num_layers)
        self.discriminator_loss = _DISCRIMINATOR_LOSSES[disc_loss]

    def discriminator_active(self, step: int) -> bool:
        return self.disc_weight > 0 and step >= self.disc_start

    def reconstruction(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Per-element reconstruction error [B, C, H, W]."""
        error = self.pixel_weight * (inputs - outputs).abs()
        if self.mse_weight:
            error = error + self.mse_weight * (inputs - outputs) ** 2
        if self.perceptual_loss is not None:
            error = error + self.perceptual_weight * self.perceptual_loss(inputs, outputs)
        return error

    def adversarial(self, nll: Tensor, outputs: Tensor, step: int, last_layer: Tensor) -> Tensor:
        """The generator's side, weighted; zero until `disc_start` and in validation."""
        if not self.discriminator_active(step):
            return nll.new_zeros(())
        loss = -self.discriminator(outputs).mean()
        if not torch.is_grad_enabled():
            return self.disc_weight * loss
        return self.disc_weight * adaptive_weight(nll, loss, last_layer) * loss

    def discriminate(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """The discriminator's side; no gradient reaches the first stage."""
        return self.discriminator_loss(
            self.discriminator(inputs.detach()), self.discriminator(outputs.detach())
        )


class LPIPSWithDiscriminator(_AdversarialLoss):
    """Loss of a KL first stage: negative log likelihood + `kl_weight` * KL (+ perceptual and adversarial parts).

    Likelihood and KL are summed over a picture and averaged over the batch, as in LDM. `logvar` is the
    output's log variance, learned if `learn_logvar` (the original held it). Further keywords are those of both losses.
    """

    def __init__(
        self,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        learn_logvar: bool = False,
        **adversarial: Any,
    ) -> None:
        super().__init__(**adversarial)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)

    def forward(
        self,
        inputs: Tensor,
        outputs: Tensor,
        posterior: DiagonalGaussianDistribution,
        step: int,
        last_layer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of encoder and decoder, and its parts for the log."""
        batch = inputs.shape[0]
        error = self.reconstruction(inputs, outputs)
        nll = (error / self.logvar.exp() + self.logvar).sum() / batch
        kl = posterior.kl().sum() / batch
        adversarial = self.adversarial(nll, outputs, step, last_layer)
        loss = nll + self.kl_weight * kl + adversarial
        parts = {
            "total_loss": loss,
            "rec_loss": error.mean(),
            "nll_loss": nll,
            "kl_loss": kl,
            "g_loss": adversarial,
            "logvar": self.logvar,
        }
        return loss, {name: value.detach() for name, value in parts.items()}


class VQLPIPSWithDiscriminator(_AdversarialLoss):
    """Loss of a VQ first stage: mean reconstruction error + `codebook_weight` * commitment (+ the other parts).

    `n_classes` is taken from old YAMLs; it was only counted with. Further keywords are those of both losses.
    """

    def __init__(
        self, codebook_weight: float = 1.0, n_classes: int | None = None, **adversarial: Any
    ) -> None:
        super().__init__(**adversarial)
        self.codebook_weight = codebook_weight

    def forward(
        self, inputs: Tensor, outputs: Tensor, codebook_loss: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of encoder, codebook and decoder, and its parts for the log."""
        nll = self.reconstruction(inputs, outputs).mean()
        adversarial = self.adversarial(nll, outputs, step, last_layer)
        loss = nll + self.codebook_weight * codebook_loss.mean() + adversarial
        parts = {
            "total_loss": loss,
            "rec_loss": nll,
            "quant_loss": codebook_loss.mean(),
            "g_loss": adversarial,
        }
        return loss, {name: value.detach() for name, value in parts.items()}
