"""Denoising diffusion as a Lightning module: this file wires, the rooms beside it compute."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state, read_state_dict
from ldm.models.diffusion import weighting
from ldm.models.diffusion.conditioning import Condition, DiffusionWrapper
from ldm.models.diffusion.previews import preview_images
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.optim import build_optimizer
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, pretrained_wanted

logger = logging.getLogger(__name__)

PARAMETERIZATIONS = ("eps", "x0", "v")


class DDPM(NoiseSchedule, pl.LightningModule):
    """Denoising diffusion in pixel space (Ho et al. 2020), and the base of `LatentDiffusion`.

    Parameters have the original's names and defaults. Beside them: `ema_decay`; `loss_weighting` and
    `min_snr_gamma`, `timestep_sampling` and `timestep_range` (see `weighting`); `optimizer_config` (see
    `ldm.models.optim`); `ucg_rate`, the share of captions replaced by the empty one when a model is trained from
    scratch.
    """

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
        weighting.check(loss_weighting, timestep_sampling, timestep_range)
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.monitor = monitor
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
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
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, ema_decay)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        bias = None
        if timestep_sampling == "biased":
            bias = weighting.noise_bias(self.alphas_cumprod / (1 - self.alphas_cumprod))
        self.register_buffer("timestep_bias", bias, persistent=False)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self._initial_checkpoint = (ckpt_path, tuple(ignore_keys), load_only_unet)
        if type(self) is DDPM:
            self.init_from_ckpt()

    def init_from_ckpt(self) -> None:
        """Fill the finished model from `ckpt_path`, without keys that begin with one of `ignore_keys`."""
        path, ignore_keys, only_unet = self._initial_checkpoint
        if path is None or not pretrained_wanted():
            return
        state = {
            k: v for k, v in read_state_dict(path).items() if not (ignore_keys and k.startswith(ignore_keys))
        }
        if only_unet:
            prefix = "model."
            ignore_keys = tuple(key.removeprefix(prefix) for key in ignore_keys)
            state = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
        model = self.model if only_unet else self
        load_state(model, state, source=f"ckpt_path '{path}'", filled=ignore_keys)

    def on_weights_loaded(self, state: Mapping[str, Tensor]) -> None:
        """Averages that a checkpoint did not bring begin at the weights it brought."""
        if self.use_ema and not any(key.startswith("model_ema.") for key in state):
            self.model_ema.reset(self.model)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """The denoiser has its averaged weights within this block, if it keeps them."""
        if not self.use_ema:
            yield
            return
        if context is not None:
            logger.debug("%s: averaged weights in use", context)
        with self.model_ema.applied_to(self.model):
            yield

    # -- the denoiser ----------------------------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """What the network predicts for x_noisy [B, C, h, w] at timesteps t [B] under a condition."""
        return self.model(x_noisy, t, **self.model.keywords(cond))

    # -- the loss --------------------------------------------------------------------------------------------

    def get_loss(self, prediction: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Squared or absolute error in float32, averaged if `mean`."""
        difference = target.float() - prediction.float()
        error = difference.abs() if self.loss_type == "l1" else difference**2
        return error.mean() if mean else error

    def p_losses(
        self, x_start: Tensor, cond: Condition | None, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of x_start [B, C, h, w] at timesteps t [B], and its parts for the log."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        error = self.get_loss(output, self.training_target(x_start, t, noise), mean=False)
        simple = error.flatten(1).mean(dim=1)  # (B,)
        weights = weighting.loss_weights(
            self.loss_weighting, self.min_snr_gamma, self.snr(t), self.parameterization
        )
        logvar = self.logvar[t]
        loss = self.l_simple_weight * (weights * simple / logvar.exp() + logvar).mean()
        vlb = (self.lvlb_weights[t] * simple).mean()
        loss = loss + self.original_elbo_weight * vlb
        prefix = "train" if self.training else "val"
        parts = {f"{prefix}/loss_simple": simple.mean(), f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}
        if self.learn_logvar:
            parts[f"{prefix}/logvar"] = self.logvar.mean()
        loss, extra = self.regularise(loss)
        parts |= {f"{prefix}/{name}": value for name, value in extra.items()}
        return loss, {name: value.detach() for name, value in parts.items()}

    def regularise(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Add what pulls the parameters towards a prior; nothing in pixel space."""
        return loss, {}

    def forward(self, x: Tensor, cond: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at random timesteps."""
        return self.p_losses(x, cond, self.random_timesteps(x.shape[0]))

    def random_timesteps(self, count: int) -> Tensor:
        """Timesteps [count] for a training step, as `timestep_sampling` and `timestep_range` say."""
        return weighting.sample_timesteps(
            self.timestep_sampling,
            count,
            self.num_timesteps,
            self.alphas_cumprod.device,
            span=self.timestep_range,
            bias=self.timestep_bias,
        )

    # -- training --------------------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any], key: str) -> Any:
        """Pictures [B, 3, H, W] of a batch that holds [B, H, W, 3]."""
        x = batch[key]
        x = x[..., None] if x.ndim == 3 else x
        return x.movedim(-1, 1).to(self.device, torch.float32, memory_format=torch.contiguous_format)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, parts = self.shared_step(batch)
        size = _size(batch)
        self.log_dict(parts, prog_bar=False, logger=True, on_step=True, on_epoch=False, batch_size=size)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, batch_size=size)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        size = _size(batch)
        _, parts = self.shared_step(batch)
        self.log_dict(parts, on_epoch=True, batch_size=size)
        if self.use_ema:
            with self.ema_scope():
                _, averaged = self.shared_step(batch)
            self.log_dict(
                {f"{key}_ema": value for key, value in averaged.items()}, on_epoch=True, batch_size=size
            )

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """Step, and let what follows the weights follow before any callback can save them."""
        super().optimizer_step(*arguments, **keywords)
        self.after_optimizer_step(self.global_step + 1)  # Lightning counts when this returns

    def after_optimizer_step(self, step: int) -> None:
        """Told after each optimizer step how many there were."""
        if self.use_ema:
            self.model_ema(self.model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained: the denoiser, and the output variances if they are learned."""
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        if self.learn_logvar:
            groups.append({"params": [self.logvar]})
        return groups

    def configure_optimizers(self) -> Any:
        return build_optimizer(
            self.parameter_groups(), self.learning_rate, self.optimizer_config, self.scheduler_config
        )

    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, Tensor]:
        """Pictures [N, 3, H, W] in [-1, 1] by name; see `previews`."""
        return preview_images(self, batch, N, **options)


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))
