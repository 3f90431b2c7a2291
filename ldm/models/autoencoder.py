"""First stages: pictures to latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.first_stage_training import FirstStageTraining
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


class AutoencoderKL(FirstStageTraining):
    """First stage whose latent is a Gaussian held near the standard normal.

    `ddconfig` holds the parameters of `Encoder` and `Decoder`, `embed_dim` the latent's channels. A negative
    `initial_logvar` lets training begin with posteriors so narrow that the decoder sees more signal than noise.
    `ckpt_path` starts from earlier weights without the keys that begin with one of `ignore_keys`. `decoder_only`
    trains the decoder alone, so that a denoiser of the same latents stays right, and gives it latents with Gaussian
    noise of a standard deviation between 0 and `latent_noise`, as what a sampler makes is never quite clean. Further
    keywords are those of `FirstStageTraining`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        initial_logvar: float | None = None,
        decoder_only: bool = False,
        latent_noise: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(lossconfig, **training)
        if latent_noise and not decoder_only:
            raise ConfigError(
                f"AutoencoderKL: latent_noise is {latent_noise}, but the encoder learns too and would undo it; set "
                "decoder_only, or leave the noise out"
            )
        if not ddconfig.get("double_z", True):
            raise ConfigError(
                "AutoencoderKL: ddconfig.double_z must be true, a posterior has mean and variance"
            )
        self.embed_dim = embed_dim
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if initial_logvar is not None:
            nn.init.constant_(self.quant_conv.bias[embed_dim:], initial_logvar)
        self.init_from_ckpt(ckpt_path, ignore_keys)
        self.latent_noise = latent_noise
        if decoder_only:
            self.encoder.requires_grad_(False)
            self.quant_conv.requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Posterior of pictures [B, 3, H, W] in [-1, 1] over latents [B, embed_dim, H/f, W/f]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        if self.training and self.latent_noise:
            z = z + self.latent_noise * torch.rand_like(z[:, :1, :1, :1]) * torch.randn_like(z)
        return self.decode(z), posterior


class VQModel(FirstStageTraining):
    """First stage whose latent is quantised to `n_embed` vectors of `embed_dim` (van den Oord et al. 2017).

    `remap` and `sane_index_shape` go to the quantiser. The other parameters are those of `AutoencoderKL`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        remap: str | None = None,
        sane_index_shape: bool = False,
        **training: Any,
    ) -> None:
        super().__init__(lossconfig, **training)
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quantize = _vector_quantizer()(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Quantised latents, the codebook's loss, and the quantiser's details."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, codebook_loss, _ = self.encode(x)
        return self.decode(quantized), codebook_loss


class VQModelInterface(VQModel):
    """A VQ first stage as a diffusion model sees it: latents before quantisation, quantised when decoded."""

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        if not force_not_quantize:
            h, _, _ = self.quantize(h)
        return super().decode(h)


class IdentityFirstStage(pl.LightningModule):
    """No first stage: diffusion in pixel space."""

    def __init__(self, vq_interface: bool = False) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return x

    def quantize(self, x: Tensor) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x


def _vector_quantizer() -> type[nn.Module]:
    """taming's quantiser, imported here because only VQ first stages need the package."""
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer2
    except ImportError as error:
        raise ConfigError(
            "a VQ first stage needs VectorQuantizer2 of the package taming-transformers-rom1504; "
            "run: pip install --no-deps taming-transformers-rom1504"
        ) from error
    return VectorQuantizer2
