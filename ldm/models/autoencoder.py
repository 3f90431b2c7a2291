"""First stages: images to latents and back (Rombach et al. 2022, section 3.1), and how they are trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state, read_state_dict
from ldm.models.optimizers import build_optimizer
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError, instantiate_from_config, pretrained_wanted

logger = logging.getLogger(__name__)

# What first stages with an adversary are trained with (Esser et al. 2021).
ADAM = {"target": "torch.optim.Adam", "params": {"betas": [0.5, 0.9]}}


class FirstStageTraining(pl.LightningModule):
    """Training of an encoder and decoder by the loss that the node `lossconfig` describes.

    Sub-classes own `encoder`, `decoder` and a forward that returns the reconstruction and what the loss needs
    beside it. Optimisation is manual because two optimisers may alternate; only the generator's steps count as
    `global_step`. `scheduler_config` and `optimizer_config` are nodes, see `ldm.models.optimizers`; `lr_g_factor`
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
