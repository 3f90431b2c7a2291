"""Reconstruction losses of first stages (Rombach et al. 2022, section 3.1), without an adversary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError


class KLReconstructionLoss(nn.Module):
    """Loss of a KL first stage: negative log likelihood + `kl_weight` * KL divergence.

    Likelihood and KL divergence are summed over an image and averaged over the batch, as in LDM.

    Args:
        pixelloss_weight, mse_weight: weights of the absolute and of the squared error.
        kl_weight: weight of the KL divergence.
        logvar_init: the log variance of the output.
        learn_logvar: whether that log variance is trained; the original kept it fixed.
    """

    def __init__(
        self,
        pixelloss_weight: float = 1.0,
        mse_weight: float = 0.0,
        kl_weight: float = 1.0,
        logvar_init: float = 0.0,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.pixel_weight = pixelloss_weight
        self.mse_weight = mse_weight
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)

    def forward(
        self, inputs: Tensor, outputs: Tensor, posterior: DiagonalGaussianDistribution
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images and reconstructions [B, C, H, W], and its parts for the log."""
        batch = inputs.shape[0]
        error = pixel_error(inputs, outputs, self.pixel_weight, self.mse_weight)
        nll = (error / self.logvar.exp() + self.logvar).sum() / batch
        kl = posterior.kl().sum() / batch
        loss = nll + self.kl_weight * kl
        parts = {
            "total_loss": loss,
            "rec_loss": error.mean(),
            "nll_loss": nll,
            "kl_loss": kl,
            "logvar": self.logvar,
        }
        return loss, {name: value.detach() for name, value in parts.items()}


class VQReconstructionLoss(nn.Module):
    """Loss of a VQ first stage: mean reconstruction error + `codebook_weight` * loss of the quantiser.

    Args:
        pixelloss_weight, mse_weight: weights of the absolute and of the squared error.
        codebook_weight: weight of the quantiser's codebook and commitment loss.
    """

    def __init__(
        self, pixelloss_weight: float = 1.0, mse_weight: float = 0.0, codebook_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.pixel_weight = pixelloss_weight
        self.mse_weight = mse_weight
        self.codebook_weight = codebook_weight

    def forward(
        self, inputs: Tensor, outputs: Tensor, codebook_loss: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images and reconstructions [B, C, H, W], and its parts for the log."""
        nll = pixel_error(inputs, outputs, self.pixel_weight, self.mse_weight).mean()
        loss = nll + self.codebook_weight * codebook_loss.mean()
        parts = {"total_loss": loss, "rec_loss": nll, "quant_loss": codebook_loss.mean()}
        return loss, {name: value.detach() for name, value in parts.items()}


def pixel_error(inputs: Tensor, outputs: Tensor, absolute: float, squared: float) -> Tensor:
    """Return the weighted sum of the absolute and the squared error of each element, [B, C, H, W]."""
    error = absolute * (inputs - outputs).abs()
    return error + squared * (inputs - outputs) ** 2 if squared else error


# The original's names. Their losses add LPIPS and a discriminator, both with weight 1 by default.


def LPIPSWithDiscriminator(
    disc_start: int = 0,
    disc_weight: float = 1.0,
    disc_factor: float = 1.0,
    perceptual_weight: float = 1.0,
    disc_num_layers: int = 3,
    disc_in_channels: int = 3,
    disc_loss: str = "hinge",
    disc_conditional: bool = False,
    use_actnorm: bool = False,
    pixelloss_weight: float = 1.0,
    mse_weight: float = 0.0,
    kl_weight: float = 1.0,
    logvar_init: float = 0.0,
    learn_logvar: bool = False,
) -> KLReconstructionLoss:
    """Return the KL loss that old YAMLs call by this name, if its adversarial and perceptual weights are 0.

    Raises:
        ConfigError: one of the two weights is above 0.
    """
    _require_reconstruction_only("LPIPSWithDiscriminator", disc_weight * disc_factor, perceptual_weight)
    return KLReconstructionLoss(pixelloss_weight, mse_weight, kl_weight, logvar_init, learn_logvar)


def VQLPIPSWithDiscriminator(
    disc_start: int = 0,
    disc_weight: float = 1.0,
    disc_factor: float = 1.0,
    perceptual_weight: float = 1.0,
    disc_num_layers: int = 3,
    disc_in_channels: int = 3,
    disc_loss: str = "hinge",
    disc_conditional: bool = False,
    disc_ndf: int = 64,
    use_actnorm: bool = False,
    n_classes: int | None = None,
    perceptual_loss: str = "lpips",
    pixel_loss: str = "l1",
    pixelloss_weight: float = 1.0,
    mse_weight: float = 0.0,
    codebook_weight: float = 1.0,
) -> VQReconstructionLoss:
    """Return the VQ loss that old YAMLs call by this name, if its adversarial and perceptual weights are 0.

    Raises:
        ConfigError: one of the two weights is above 0, or `pixel_loss` is not the absolute error.
    """
    _require_reconstruction_only("VQLPIPSWithDiscriminator", disc_weight * disc_factor, perceptual_weight)
    if pixel_loss != "l1":
        raise ConfigError(f"VQLPIPSWithDiscriminator: pixel_loss is '{pixel_loss}'; use l1 or mse_weight")
    return VQReconstructionLoss(pixelloss_weight, mse_weight, codebook_weight)


def _require_reconstruction_only(name: str, adversarial: float, perceptual: float) -> None:
    if adversarial > 0 or perceptual > 0:
        raise ConfigError(
            f"{name}: disc_weight is {adversarial:g} and perceptual_weight {perceptual:g}, but only reconstruction "
            "losses are trained here; set both to 0"
        )
