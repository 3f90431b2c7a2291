"""First stages: images to latents and back (Rombach et al. 2022, section 3.1), and how they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from einops import reduce
from torch import Tensor, nn

from ldm.checkpoint import load_state
from ldm.diffusers_layout import read_vae
from ldm.models.optimizers import build_optimizer
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.util import channels_first
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError, instantiate_from_config, pretrained_wanted

# The optimizer of the original's first stages (Esser et al. 2021).
ADAM = {"target": "torch.optim.Adam", "params": {"betas": [0.5, 0.9]}}


class FirstStageTraining(pl.LightningModule):
    """Training of an encoder and a decoder by a reconstruction loss.

    Subclasses have a forward that returns the reconstruction and what the loss needs besides it (a posterior or the
    codebook's loss). The loss is built when training or validation begins: a first stage that only encodes and
    decodes needs none, and may name one that cannot be trained here.

    Args:
        lossconfig: the node of a loss such as `ldm.modules.losses.KLReconstructionLoss`.
        image_key: the batch's key of the images.
        monitor: the logged value by which checkpoints are compared.
        scheduler_config, optimizer_config: nodes, see `ldm.models.optimizers`.
        lr_g_factor: multiplies the learning rate.
    """

    learning_rate: float  # set by whoever trains

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
        self.lossconfig = lossconfig
        self.loss: nn.Module | None = None
        self.image_key = image_key
        self.monitor = monitor
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config or ADAM
        self.lr_g_factor = lr_g_factor

    def configure_model(self) -> None:
        """Build the loss; Lightning calls this before it reads a checkpoint to resume from.

        Raises:
            ConfigError: `lossconfig` names no loss that can be trained here.
        """
        if self.loss is None:
            self.loss = instantiate_from_config(self.lossconfig)
        if isinstance(self.loss, nn.Identity):
            raise ConfigError(
                f"{type(self).__name__}: lossconfig {self.lossconfig['target']} is no loss; to train, name "
                "ldm.modules.losses.KLReconstructionLoss or VQReconstructionLoss"
            )

    def init_from_ckpt(self, path: str | None, ignore_keys: Sequence[str] = ()) -> None:
        """Start from the weights of a checkpoint, without keys that begin with one of `ignore_keys`.

        `path` may be a file or folder in the layout of LDM or diffusers, of a first stage or of a whole model.
        """
        if path is None or not pretrained_wanted():
            return
        state = {k: v for k, v in read_vae(path)[0].items() if not k.startswith(tuple(ignore_keys))}
        load_state(self, state, source=f"first stage '{path}'", filled=tuple(ignore_keys))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Published checkpoints hold the loss that their first stage was trained with.
        if self.loss is None:
            for key in [key for key in state_dict if key.startswith(f"{prefix}loss.")]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the batch's images, [B, H, W, C], as [B, C, H, W] in float32 on the model's device."""
        return channels_first(batch[self.image_key], self.device)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return the batch's images, their reconstructions, the loss, and its parts for the log."""
        assert self.loss is not None  # configure_model has built it
        x = self.get_input(batch)
        reconstruction, detail = self(x)
        loss, parts = self.loss(x, reconstruction, detail)
        return x, reconstruction, loss, parts

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        x, _, loss, parts = self.shared_step(batch)
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(x))
        self.log("loss", parts["rec_loss"], prog_bar=True, logger=False, batch_size=len(x))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the parts of the loss and the PSNR in dB of images in [-1, 1]."""
        x, reconstruction, _, parts = self.shared_step(batch)
        error = reduce((reconstruction.clamp(-1, 1) - x) ** 2, "b c h w -> b", "mean")
        parts["psnr"] = (10 * torch.log10(4.0 / error)).mean()
        self.log_dict({f"val/{name}": value for name, value in parts.items()}, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        rate = self.learning_rate * self.lr_g_factor
        return build_optimizer([{"params": parameters}], rate, self.optimizer_config, self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **unused: Any) -> dict[str, Tensor]:
        """Return the first `N` images and their reconstructions, [N, C, H, W] in [-1, 1]."""
        x = self.get_input(batch)[:N]
        reconstruction, _ = self(x)
        return {"inputs": x, "reconstruction": reconstruction}


class AutoencoderKL(FirstStageTraining):
    """First stage whose latent is Gaussian, held near the standard normal distribution by the loss.

    Args:
        ddconfig: the parameters of `Encoder` and `Decoder`; `double_z` must be true.
        lossconfig: the node of the loss; see `FirstStageTraining`.
        embed_dim: the latent's channels.
        ckpt_path: start from the weights of this checkpoint, without keys that begin with one of `ignore_keys`.
        initial_logvar: the posteriors' log variance at the start; a negative one lets the decoder see more signal
            than noise from the first step on.
        decoder_only: train the decoder alone, so that the latents, and a denoiser trained on them, stay valid.
        latent_noise: with `decoder_only`, add Gaussian noise to the latents in training, of a standard deviation
            drawn between 0 and this: a sampler's latents are not quite clean either.
        **training: the other parameters of `FirstStageTraining`.
    Raises:
        ConfigError: these parameters contradict each other.
        UserError: the checkpoint cannot be read or does not fit.
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
                f"AutoencoderKL: latent_noise is {latent_noise}, but the encoder is trained too and would cancel it; "
                "set decoder_only, or remove latent_noise"
            )
        if not ddconfig.get("double_z", True):
            raise ConfigError(
                "AutoencoderKL: ddconfig.double_z must be true, because a posterior has mean and variance"
            )
        self.embed_dim = embed_dim
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if initial_logvar is not None and self.quant_conv.bias is not None:
            nn.init.constant_(self.quant_conv.bias[embed_dim:], initial_logvar)
        self.init_from_ckpt(ckpt_path, ignore_keys)
        self.latent_noise = latent_noise
        if decoder_only:
            self.encoder.requires_grad_(False)
            self.quant_conv.requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior over latents [B, embed_dim, H/f, W/f] of images [B, 3, H, W] in [-1, 1]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, 3, f*h, f*w], about [-1, 1], of latents [B, embed_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstruction of images [B, 3, H, W], and their posterior."""
        posterior = self.encode(x)
        z = posterior.sample() if sample_posterior else posterior.mode()
        if self.training and self.latent_noise:
            z = z + self.latent_noise * torch.rand_like(z[:, :1, :1, :1]) * torch.randn_like(z)
        return self.decode(z), posterior


class VQModel(FirstStageTraining):
    """First stage whose latent is quantised to `n_embed` vectors of `embed_dim` (van den Oord et al. 2017).

    `remap` and `sane_index_shape` are passed to the quantiser; for the other parameters see `AutoencoderKL`.
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
        """Return quantised latents, the codebook's loss, and the quantiser's details of images [B, 3, H, W]."""
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Return latents [B, embed_dim, h, w] before quantisation of images [B, 3, H, W] in [-1, 1]."""
        return self.quant_conv(self.encoder(x))

    def decode(self, quantized: Tensor) -> Tensor:
        """Return images [B, 3, f*h, f*w], about [-1, 1], of quantised latents."""
        return self.decoder(self.post_quant_conv(quantized))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of images [B, 3, H, W], and the codebook's loss."""
        quantized, codebook_loss, _ = self.encode(x)
        return self.decode(quantized), codebook_loss


class VQModelInterface(VQModel):
    """A VQ first stage for a diffusion model, which sees latents before quantisation; decoding quantises them."""

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]  # the interface of the original
        """Return latents [B, embed_dim, h, w] before quantisation of images [B, 3, H, W] in [-1, 1]."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return images of latents, which are quantised first unless `force_not_quantize`."""
        if not force_not_quantize:
            h, _, _ = self.quantize(h)
        return super().decode(h)


class IdentityFirstStage(pl.LightningModule):
    """The first stage of diffusion in pixel space: latents are the images themselves."""

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
    """Import taming's quantiser here, because only VQ first stages need that package."""
    try:
        from taming.modules.vqvae.quantize import VectorQuantizer2
    except ImportError as error:
        raise ConfigError(
            "a VQ first stage needs VectorQuantizer2 of the package taming-transformers-rom1504; "
            "run: pip install --no-deps taming-transformers-rom1504"
        ) from error
    return VectorQuantizer2
