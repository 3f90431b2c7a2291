"""Diffusion models as Lightning modules: `DDPM` in pixel space, `LatentDiffusion` in the latent space of a first stage.

A training step runs `training_step`, `shared_step`, `get_input`, `forward`, `p_losses`, `apply_model`. LatentDiffusion
replaces `get_input` and `forward`, which encode images and captions, and adds to `p_losses`; all else is shared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state, read_state_dict
from ldm.models.diffusion.conditioning import (
    Captioned,
    Condition,
    DiffusionWrapper,
    GuidedCondition,
    at_timesteps,
    extrapolated,
    outputs_under,
    requires_grad,
    without,
)
from ldm.models.diffusion.personalised import Personalised
from ldm.models.diffusion.previews import preview_images
from ldm.models.diffusion.schedule import (
    LOSS_WEIGHT,
    NoiseSchedule,
    check_loss_options,
    loss_weights,
    noise_bias,
    sample_means,
    sample_timesteps,
)
from ldm.models.optimizers import build_optimizer
from ldm.modules.diffusionmodules.util import channels_first
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, instantiate_from_config, pretrained_wanted

logger = logging.getLogger(__name__)

PARAMETERIZATIONS = ("eps", "x0", "v")
# Under these keys a batch holds moments [B, 2C, h, w] or latents [B, C, h, w] that a cache encoded, not images.
POSTERIOR, LATENT = "posterior", "latent"


class DDPM(NoiseSchedule, pl.LightningModule):
    """Denoising diffusion (Ho et al. 2020) in pixel space, and the base of `LatentDiffusion`.

    Names and defaults of the parameters up to `model_lr` are the original's. The constructor ends by reading
    `ckpt_path`. A subclass that adds modules passes it no `ckpt_path` and calls `init_from_ckpt` at the end of its own
    constructor, as LatentDiffusion does.

    Args:
        unet_config: node of the denoiser.
        timesteps: T, the number of noise levels.
        beta_schedule, linear_start, linear_end, cosine_s, given_betas: the noise schedule; see `make_beta_schedule`.
            `given_betas` [T] replaces the others.
        loss_type: l2 for the squared error, l1 for the absolute error.
        ckpt_path: checkpoint to start from.
        ignore_keys: beginnings of the checkpoint's keys that are not loaded.
        load_only_unet: load nothing but the denoiser.
        monitor: the logged value by which checkpoints are compared.
        use_ema: keep a running average of the denoiser's weights, with rate `ema_decay`.
        first_stage_key: the batch's key of the images.
        image_size, channels: of what is denoised.
        log_every_t, clip_denoised: kept for old YAMLs; they change nothing.
        original_elbo_weight: weight of the variational bound in the loss.
        embedding_reg_weight: weight of the distance of learned vectors from their initial ones.
        v_posterior: variance of the reverse step, from its lower bound (0) to its upper bound (1).
        l_simple_weight: weight of the error in the loss.
        conditioning_key: how a condition enters the denoiser; see `DiffusionWrapper`.
        parameterization: what the denoiser predicts: eps, x0 or v.
        scheduler_config: node of the learning-rate schedule; see `ldm.models.optimizers`.
        use_positional_encodings: must be false.
        learn_logvar, logvar_init: the log variance of the output per timestep, and whether it is trained.
        unfreeze_model: with a personalization, train the denoiser too, at the learning rate `model_lr`.
        ema_decay: rate of the running average.
        loss_weighting, min_snr_gamma: weight of each timestep in the loss; see `loss_weights`.
        timestep_sampling, timestep_range: which timesteps a training step draws; see `sample_timesteps`.
        optimizer_config: node of the optimizer; see `ldm.models.optimizers`.
        ucg_rate: share of captions that training replaces by the empty one, for classifier-free guidance.
    Raises:
        ConfigError: a value is unknown or not supported.
        UserError: the checkpoint cannot be read or does not fit.
    """

    learning_rate: float  # set by whoever trains
    model_ema: LitEma
    logvar: Tensor
    timestep_bias: Tensor | None

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        embedding_reg_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        unfreeze_model: bool = False,
        model_lr: float = 0.0,
        ema_decay: float = 0.9999,
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
        timestep_sampling: str = "uniform",
        timestep_range: Sequence[float] = (0.0, 1.0),
        optimizer_config: Mapping[str, Any] | None = None,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise ConfigError(
                f"parameterization '{parameterization}' is unknown; use one of {', '.join(PARAMETERIZATIONS)}"
            )
        if loss_type not in ("l1", "l2"):
            raise ConfigError(f"loss_type '{loss_type}' is unknown; use l1 or l2")
        if use_positional_encodings:
            raise ConfigError("use_positional_encodings is not supported; the original never read it")
        check_loss_options(loss_weighting, timestep_sampling, timestep_range)
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.original_elbo_weight = original_elbo_weight
        self.embedding_reg_weight = embedding_reg_weight
        self.v_posterior = v_posterior
        self.l_simple_weight = l_simple_weight
        self.unfreeze_model = unfreeze_model
        self.model_lr = model_lr
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = min_snr_gamma
        self.timestep_sampling = timestep_sampling
        self.timestep_range = tuple(timestep_range)
        self.optimizer_config = optimizer_config
        self.scheduler_config = scheduler_config
        self.ucg_rate = ucg_rate

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.denoiser_is_trained = True
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, ema_decay)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        bias = noise_bias(snr) if timestep_sampling == "biased" else None
        self.register_buffer("timestep_bias", bias, persistent=False)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def init_from_ckpt(
        self, path: str | None, ignore_keys: Sequence[str] = (), only_model: bool = False
    ) -> None:
        """Load a checkpoint, without keys that begin with one of `ignore_keys`; of the denoiser if `only_model`.

        Raises:
            UserError: the checkpoint cannot be read or does not fit.
        """
        if path is None or not pretrained_wanted():
            return
        ignored = tuple(ignore_keys)
        state = {k: v for k, v in read_state_dict(path).items() if not (ignored and k.startswith(ignored))}
        if only_model:
            ignored = tuple(key.removeprefix("model.") for key in ignored)
            state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        load_state(self.model if only_model else self, state, source=f"ckpt_path '{path}'", filled=ignored)

    def on_weights_loaded(self, state: Mapping[str, Tensor]) -> None:
        """Start the averages at the weights that were loaded, if the checkpoint holds no averages."""
        if self.use_ema and not _holds(state, "model_ema."):
            self.model_ema.reset(self.model)

    # -- a training step, in the order in which it runs ------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, parts = self.shared_step(batch)
        size = len(next(iter(batch.values())))
        self.log_dict(parts, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        return loss

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch of training or validation, and its parts for the log."""
        weight = {"weight": batch[LOSS_WEIGHT]} if LOSS_WEIGHT in batch else {}
        return self(*self.get_input(batch, self.first_stage_key), **weight)

    def get_input(self, batch: Mapping[str, Any], key: str) -> tuple[Tensor, Any]:
        """Return what is denoised and its condition, not yet encoded: images [B, C, H, W] of [B, H, W, C], and None."""
        return channels_first(batch[key], self.device), None

    def forward(self, x: Tensor, cond: Any = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of x [B, C, H, W] at random timesteps, and its parts; `options` are those of `p_losses`."""
        return self.p_losses(x, cond, self.random_timesteps(x.shape[0]), **options)

    def random_timesteps(self, count: int) -> Tensor:
        """Return timesteps [count] for a training step, by `timestep_sampling` and `timestep_range`."""
        device, span, bias = self.alphas_cumprod.device, self.timestep_range, self.timestep_bias
        return sample_timesteps(
            self.timestep_sampling, count, self.num_timesteps, device, span=span, bias=bias
        )

    def p_losses(
        self,
        x_start: Tensor,
        cond: Condition | None,
        t: Tensor,
        noise: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of x_start [B, C, h, w] at t [B] (Ho et al. 2020, eq. 14); `weight`: see `sample_means`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        error = self.get_loss(output, self.training_target(x_start, t, noise))
        simple = sample_means(error, weight)  # (B,)
        weights = loss_weights(self.loss_weighting, self.min_snr_gamma, self.snr(t), self.parameterization)
        logvar = self.logvar[t]
        loss = self.l_simple_weight * (weights * simple / logvar.exp() + logvar).mean()
        vlb = (self.lvlb_weights[t] * simple).mean()
        loss = loss + self.original_elbo_weight * vlb
        parts = {"loss_simple": simple.mean(), "loss_vlb": vlb, "loss": loss}
        if self.learn_logvar:
            parts["logvar"] = self.logvar.mean()
        return loss, {f"{self.stage}/{name}": value.detach() for name, value in parts.items()}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Return the denoiser's prediction for x_noisy [B, C, h, w] at timesteps t [B] under a condition."""
        if isinstance(cond, GuidedCondition):
            if torch.is_grad_enabled() and not (self.denoiser_is_trained or requires_grad(cond.uncond)):
                # A negative prompt without learned words needs no backward pass.
                with torch.no_grad():
                    start = self.apply_model(x_noisy, t, cond.uncond)
                return extrapolated(start, self.apply_model(x_noisy, t, cond.cond), cond.scale)
            outputs = outputs_under(self.apply_model, x_noisy, t, [cond.uncond, cond.cond])
            return extrapolated(*outputs, cond.scale)
        return self.model(x_noisy, t, **self.model.keywords(at_timesteps(cond, t)))

    def get_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the squared or absolute error of each element, in float32."""
        difference = target.float() - prediction.float()
        return difference.abs() if self.loss_type == "l1" else difference**2

    @property
    def stage(self) -> str:
        """The prefix of logged values: train or val."""
        return "train" if self.training else "val"

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, and update the averages before any callback can save them."""
        super().optimizer_step(*arguments, **keywords)
        if self.use_ema and self.denoiser_is_trained:
            self.model_ema(self.model)

    # -- the rest of training --------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = len(next(iter(batch.values())))
        _, parts = self.shared_step(batch)
        self.log_dict(parts, on_epoch=True, batch_size=size)
        if self.use_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch)
            averaged = {f"{key}_ema": value for key, value in averaged.items()}
            self.log_dict(averaged, on_epoch=True, batch_size=size)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this block the denoiser has its averaged weights, if `use_ema`."""
        if not self.use_ema:
            yield
            return
        logger.debug("%s: averaged weights in use", context)
        with self.model_ema.applied_to(self.model):
            yield

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what is trained: the denoiser, and the output variances with `learn_logvar`."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.learn_logvar:
            groups.append({"params": [self.logvar]})
        return groups

    def configure_optimizers(self) -> Any:
        return build_optimizer(
            self.parameter_groups(), self.learning_rate, self.optimizer_config, self.scheduler_config
        )

    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, Tensor]:
        """Return the first `N` images of a batch, [N, C, H, W] in [-1, 1], as `inputs`."""
        return {"inputs": channels_first(batch[self.first_stage_key][:N], self.device)}


class LatentDiffusion(Captioned, Personalised, DDPM):
    """Diffusion in the latent space of a first stage, under a condition (Rombach et al. 2022).

    With `personalization_config` everything but the personalization's parameters is frozen, and the denoiser too
    unless `unfreeze_model`. Averages of a frozen denoiser are kept only where a checkpoint holds them. Without it the
    denoiser is trained, and the encoder of the condition if `cond_stage_trainable`.

    Args:
        first_stage_config: node of the first stage.
        cond_stage_config: node of the condition's encoder, "__is_first_stage__" or "__is_unconditional__".
        personalization_config: node of a `ldm.modules.personalization.Personalization`.
        num_timesteps_cond: must be 1.
        cond_stage_key: the batch's key of the condition.
        cond_stage_trainable: train the condition's encoder.
        concat_mode: without `conditioning_key`, concatenate the condition as channels rather than attend to it.
        cond_stage_forward: the encoder's method to call in place of `encode`.
        scale_factor: multiplies latents.
        scale_by_std: set `scale_factor` from the first batch, so that its latents have unit variance.
        conditioning_key, ckpt_path, ignore_keys, load_only_unet, **ddpm: see `DDPM`.
    """

    # A checkpoint need not hold these: they are learned here, or kept by training alone.
    optional_state = ("embedding_manager.", "model_ema.", "logvar", "cond_stage_model.transformer.to_logits.")

    first_stage_model: Any  # any module with encode and decode
    cond_stage_model: Any  # a TextEncoder, an encoder of another condition, the first stage, or None
    scale_factor: Tensor | float

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        personalization_config: Mapping[str, Any] | None = None,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **ddpm: Any,
    ) -> None:
        if (num_timesteps_cond or 1) != 1:
            raise ConfigError(f"num_timesteps_cond is {num_timesteps_cond}; only 1 (a clean condition) works")
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **ddpm)
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = scale_factor
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = None
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        elif not isinstance(cond_stage_config, str):
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.cond_stage_trainable = cond_stage_trainable and personalization_config is None
        self.embedding_manager = None
        if personalization_config is not None:
            self.embedding_manager = self.make_personalization(personalization_config)
        self._freeze()
        self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def _freeze(self) -> None:
        encoder = self.cond_stage_model
        froze_itself = encoder is not None and not any(p.requires_grad for p in encoder.parameters())
        if encoder is not None and not self.cond_stage_trainable:
            encoder.eval().requires_grad_(False)
        elif froze_itself and encoder is not self.first_stage_model:  # as CLIP's encoder does
            encoder.requires_grad_(True)
        if self.personalised:
            self.denoiser_is_trained = self.unfreeze_model
            self.model.requires_grad_(self.unfreeze_model)
            self.logvar.requires_grad_(False)
            self.strict_loading = False  # a run saves and loads what it trains, not the frozen rest

    def on_weights_loaded(self, state: Mapping[str, Tensor]) -> None:
        """Let averages and vectors that the checkpoint does not hold start from the weights that it holds."""
        super().on_weights_loaded(state)
        if self.embedding_manager is None:
            return
        if self.use_ema and not self.denoiser_is_trained and not _holds(state, "model_ema."):
            self.use_ema = False  # the average of frozen weights would be a second copy of them
            del self.model_ema
        if _holds(state, "embedding_manager."):
            self.embedding_manager.measure(self.cond_stage_model)
        else:
            self.embedding_manager.reset(self.cond_stage_model)

    @property
    def personalised(self) -> bool:
        """Whether a personalization is trained, rather than the denoiser from scratch."""
        return self.embedding_manager is not None

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set training mode, in which frozen parts stay in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        if not self.denoiser_is_trained:
            self.model.eval()
        return self

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return what a run of this model trains: the part of the state dict that no base checkpoint holds."""
        if not self.personalised:
            return self.state_dict()
        prefixes = ("embedding_manager.", *(("model.", "model_ema.") if self.denoiser_is_trained else ()))
        return {key: value for key, value in self.state_dict().items() if key.startswith(prefixes)}

    # -- a training step, in the order in which it runs ------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Set the scale from the very first batch, with `scale_by_std`."""
        if not isinstance(self.scale_factor, Tensor) or float(self.scale_factor) != 1.0:
            return
        if self.global_step == 0 and batch_idx == 0:
            self.scale_factor.fill_(1.0 / self.get_input(batch, self.first_stage_key)[0].std())
            logger.info("scale_factor is %.5f, from the first batch", float(self.scale_factor))

    def get_input(self, batch: Mapping[str, Any], key: str) -> tuple[Tensor, Any]:
        """Return latents [B, C, h, w], and the condition as the batch holds it: captions, classes, ids or images."""
        encoded: DiagonalGaussianDistribution | Tensor
        if POSTERIOR in batch:
            encoded = DiagonalGaussianDistribution(batch[POSTERIOR])
        elif LATENT in batch:
            encoded = batch[LATENT]
        else:
            encoded = self.encode_first_stage(channels_first(batch[key], self.device))
        z = self.get_first_stage_encoding(encoded).detach()
        if self.model.conditioning_key is None:
            return z, None
        if self.cond_stage_key == "class_label":
            return z, batch
        condition = batch[self.cond_stage_key]
        if not isinstance(condition, Tensor):
            return z, self.captions_of(batch)
        return z, condition if condition.ndim < 3 else channels_first(condition, self.device)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Return the posterior (KL) or the latents (VQ) of images [B, 3, H, W] in [-1, 1]."""
        with self.first_stage_on(x.device) as first_stage:
            return first_stage.encode(x)

    def get_first_stage_encoding(self, encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Return latents [B, C, h, w] at the scale that the denoiser sees; a posterior is sampled."""
        latent = encoded.sample() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scale_factor * latent

    def forward(self, x: Tensor, cond: Any = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of latents at random timesteps under a condition, which is encoded here, and its parts."""
        t = self.random_timesteps(x.shape[0])
        if cond is None:
            return self.p_losses(x, None, t, **options)
        if self.training and self.ucg_rate and isinstance(cond, list):
            cond = without(cond, torch.rand(len(cond)) < self.ucg_rate)
        self.note_captions(cond)
        trained = self.personalised or self.cond_stage_trainable
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            encoded = self.training_condition(cond)
        return self.p_losses(x, encoded, t, **options)

    def get_learned_conditioning(self, c: Any) -> Any:
        """Return a condition encoded: prompts as a context, into which the personalization puts what it learned.

        That is a tensor, or a `TimedCondition` where it depends on the timestep; see `ldm.modules.personalization`.
        """
        encoder = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(encoder, self.cond_stage_forward)(c)
        if self.personalised:
            return self._encode_captions(c)
        encoded = encoder.encode(c) if hasattr(encoder, "encode") else encoder(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def p_losses(self, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `DDPM`, plus those of the personalization: `embedding_reg_weight` and `context_loss`."""
        loss, parts = super().p_losses(*arguments, **options)
        if self.embedding_manager is None:
            return loss, parts
        if self.embedding_reg_weight > 0:
            distance = self.embedding_manager.embedding_to_coarse_loss().mean()
            parts[f"{self.stage}/loss_emb_reg"] = distance.detach()
            loss = loss + self.embedding_reg_weight * distance
        if self.training and self.embedding_manager.adds_loss:
            further = self.embedding_manager.context_loss(self.cond_stage_model)
            parts[f"{self.stage}/loss_context"] = further.detach()
            loss = loss + further
        return loss, parts

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, update the averages, and report the number of steps to the personalization."""
        super().optimizer_step(*arguments, **keywords)
        if self.embedding_manager is not None:
            self.embedding_manager.on_optimizer_step(self.global_step + 1)  # Lightning counts it afterwards

    # -- the rest --------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the personalization, and the denoiser if unfrozen; or the denoiser, and the encoder if trained."""
        if self.embedding_manager is not None:
            groups = list(self.embedding_manager.parameter_groups())
            if self.denoiser_is_trained:
                groups.append(
                    {"params": list(self.model.parameters()), "lr": self.model_lr, "name": "denoiser"}
                )
            return groups
        groups = super().parameter_groups()
        if self.cond_stage_trainable and self.cond_stage_model is not None:
            groups.append({"params": list(self.cond_stage_model.parameters())})
        return groups

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return images [B, 3, H, W], about [-1, 1], of latents [B, C, h, w] at the denoiser's scale."""
        options = {"force_not_quantize": True} if force_not_quantize else {}
        with self.first_stage_on(z.device) as first_stage:
            return first_stage.decode(z / self.scale_factor, **options)

    @contextmanager
    def first_stage_on(self, device: torch.device) -> Iterator[Any]:
        """Within this block the first stage is on a device: itself, or a copy if it lies elsewhere.

        With a cache of latents (see `LatentCache`) it lies on the CPU, and training rarely needs it.
        """
        original = self.first_stage_model
        if all(parameter.device == device for parameter in original.parameters()):
            yield original
            return
        self.first_stage_model = copy.deepcopy(original).to(device)
        try:
            yield self.first_stage_model
        finally:
            self.first_stage_model = original

    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, Tensor]:
        """Return images [n, 3, H, W] in [-1, 1] by name: inputs, reconstructions and samples; see `preview_images`."""
        return preview_images(self, batch, N, **options)


def _holds(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)
