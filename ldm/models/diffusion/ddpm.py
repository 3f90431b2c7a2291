"""Diffusion models as Lightning modules: `DDPM` in pixel space, `LatentDiffusion` in latent space."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import initialised, load_state, read_state_dict
from ldm.models.diffusion.conditioning import Condition, DiffusionWrapper
from ldm.models.diffusion.loss_weighting import check_loss_options, loss_weights, noise_bias, sample_timesteps
from ldm.models.diffusion.previews import preview_images
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.models.optimizers import build_optimizer
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, instantiate_from_config, pretrained_wanted

logger = logging.getLogger(__name__)

PARAMETERIZATIONS = ("eps", "x0", "v")


class DDPM(NoiseSchedule, pl.LightningModule):
    """Denoising diffusion in pixel space (Ho et al. 2020), and the base of `LatentDiffusion`.

    Parameters have the original's names and defaults. Beside them: `ema_decay`; `loss_weighting` and
    `min_snr_gamma`, `timestep_sampling` and `timestep_range` (see `weighting`); `optimizer_config` (see
    `ldm.models.optimizers`); `ucg_rate`, the share of captions replaced by the empty one when a model is trained from
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
        check_loss_options(loss_weighting, timestep_sampling, timestep_range)
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
            bias = noise_bias(self.alphas_cumprod / (1 - self.alphas_cumprod))
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
        weights = loss_weights(self.loss_weighting, self.min_snr_gamma, self.snr(t), self.parameterization)
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
        return sample_timesteps(
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


__all__ = ["DDPM", "LATENT", "POSTERIOR", "LatentDiffusion"]


# Under these keys a batch holds moments [B, 2C, h, w] or latents [B, C, h, w] encoded before, in place of pictures.
POSTERIOR, LATENT = "posterior", "latent"


class LatentDiffusion(DDPM):
    """Diffusion in the latent space of a first stage, under a condition (Rombach et al. 2022).

    `first_stage_config` and `cond_stage_config` are nodes; the latter may be "__is_first_stage__" or
    "__is_unconditional__". With `personalization_config`, the node of an embedding manager, everything but its
    parameters is frozen (and the denoiser too, unless `unfreeze_model`); without it the denoiser is trained, and the
    condition's encoder if `cond_stage_trainable`. Of a frozen denoiser averages are kept only where a checkpoint
    brings them. Latents are multiplied by `scale_factor`, or with `scale_by_std`
    by what gives the first batch unit variance. Further keywords are those of `DDPM`.
    """

    # A checkpoint need not bring these: they are learned here, or kept by training alone.
    optional_state = ("embedding_manager.", "model_ema.", "logvar", "cond_stage_model.transformer.to_logits.")

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
        **ddpm: Any,
    ) -> None:
        if (num_timesteps_cond or 1) != 1:
            raise ConfigError(
                f"num_timesteps_cond is {num_timesteps_cond}; only 1 (a clean condition) is supported"
            )
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
        self.cond_stage_model = self._condition_encoder(cond_stage_config)
        self.cond_stage_trainable = cond_stage_trainable and personalization_config is None
        self.embedding_manager = None
        self._captions_of_step: set[str] = set()
        if personalization_config is not None:
            with initialised():  # a base checkpoint does not bring what is learned here
                self.embedding_manager = instantiate_from_config(
                    personalization_config, embedder=self.cond_stage_model
                )
        self._freeze()
        self.init_from_ckpt()

    def _condition_encoder(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        if config == "__is_first_stage__":
            return self.first_stage_model
        return None if config == "__is_unconditional__" else instantiate_from_config(config)

    def _freeze(self) -> None:
        encoder = self.cond_stage_model
        if encoder is not None and not self.cond_stage_trainable:
            encoder.eval().requires_grad_(False)
        elif encoder not in (None, self.first_stage_model) and not any(_trained(encoder)):
            encoder.requires_grad_(True)  # it froze itself, as CLIP's does, and is to be trained after all
        if self.personalised:
            self.model.requires_grad_(self.unfreeze_model)
            self.logvar.requires_grad_(False)
            # A run then saves and loads the vectors alone; the frozen rest comes from its own checkpoint.
            self.strict_loading = False

    def on_weights_loaded(self, state: Mapping[str, Tensor]) -> None:
        """Vectors that the weights did not bring begin at the words of the encoder that has just been filled."""
        super().on_weights_loaded(state)
        if not self.personalised:
            return
        if (
            self.use_ema
            and not self.unfreeze_model
            and not any(key.startswith("model_ema.") for key in state)
        ):
            # The average of weights that stand still would be a second copy of them.
            self.use_ema = False
            del self.model_ema
        if not any(key.startswith("embedding_manager.") for key in state):
            self.embedding_manager.reset(self.cond_stage_model)
        elif hasattr(self.embedding_manager, "measure"):
            self.embedding_manager.measure(self.cond_stage_model)

    @property
    def personalised(self) -> bool:
        """Whether vectors are learned, rather than the denoiser trained from scratch."""
        return self.embedding_manager is not None

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen parts stay in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        if self.personalised and not self.unfreeze_model:
            self.model.eval()
        return self

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a run of this model learns: the part of the state dict that a base checkpoint does not hold."""
        if not self.personalised:
            return self.state_dict()
        prefixes = (
            ("embedding_manager.", "model.", "model_ema.") if self.unfreeze_model else ("embedding_manager.",)
        )
        return {key: value for key, value in self.state_dict().items() if key.startswith(prefixes)}

    # -- first stage -----------------------------------------------------------------------------------------

    @contextmanager
    def first_stage_on(self, device: torch.device) -> Iterator[nn.Module]:
        """The first stage on a device for this block; where it rests elsewhere, a copy that goes with the block.

        A cache of latents lets it rest on the CPU (see `LatentCache`), and few things need it from then on.
        """
        resting = self.first_stage_model
        if all(parameter.device == device for parameter in resting.parameters()):
            yield resting
            return
        self.first_stage_model = copy.deepcopy(resting).to(device)
        try:
            yield self.first_stage_model
        finally:
            self.first_stage_model = resting

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Posterior (KL) or latent (VQ) of pictures [B, 3, H, W] in [-1, 1]."""
        with self.first_stage_on(x.device) as first_stage:
            return first_stage.encode(x)

    def get_first_stage_encoding(self, encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """A latent [B, C, h, w] at the scale that the denoiser sees; a posterior is sampled."""
        latent = encoded.sample() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scale_factor * latent

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1], of latents at the denoiser's scale."""
        options = {"force_not_quantize": True} if force_not_quantize else {}
        with self.first_stage_on(z.device) as first_stage:
            return first_stage.decode(z / self.scale_factor, **options)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Take the scale from the very first batch, if asked to."""
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0 and float(self.scale_factor) == 1.0:
            self.scale_factor.fill_(1.0 / self._latents(batch, self.first_stage_key).std())
            logger.info("scale_factor is %.5f, from the first batch", float(self.scale_factor))

    # -- condition -------------------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode a condition: prompts to [B, M, d]; the embedding manager puts its vectors in."""
        encoder = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(encoder, self.cond_stage_forward)(c)
        if self.personalised:
            return self._encode_captions(c)
        encoded = encoder.encode(c) if callable(getattr(encoder, "encode", None)) else encoder(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def _encode_captions(self, captions: Any) -> Tensor:
        """Equal captions of a batch go through the text encoder once; their rows [M, d] are then shared."""
        encoder, manager = self.cond_stage_model, self.embedding_manager
        different = list(dict.fromkeys(captions)) if isinstance(captions, (list, tuple)) else captions
        encoded = encoder.encode(different, embedding_manager=manager)
        if len(different) == len(captions):
            return encoded
        places = torch.tensor([different.index(caption) for caption in captions])
        # Without waiting for the device: the steps before are still at work there.
        return encoded.index_select(0, places.to(encoded.device, non_blocking=True))

    # -- training --------------------------------------------------------------------------------------------

    def get_input(self, batch: Mapping[str, Any], key: str) -> tuple[Tensor, Any]:
        """Latents [B, C, h, w] and the condition as the batch holds it (captions, labels or pictures)."""
        return self._latents(batch, key), self._raw_condition(batch)

    def _latents(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Of pictures, or of what a cache has encoded before."""
        if POSTERIOR in batch:
            encoded = DiagonalGaussianDistribution(batch[POSTERIOR])
        elif LATENT in batch:
            encoded = batch[LATENT]
        else:
            encoded = self.encode_first_stage(super().get_input(batch, key))
        return self.get_first_stage_encoding(encoded).detach()

    def _raw_condition(self, batch: Mapping[str, Any]) -> Any:
        if self.model.conditioning_key is None:
            return None
        if self.cond_stage_key == "class_label":
            return batch
        value = batch[self.cond_stage_key]
        return super().get_input(batch, self.cond_stage_key) if isinstance(value, Tensor) else list(value)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self(*self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, cond: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of latents at random timesteps under a raw condition, which is encoded here."""
        t = self.random_timesteps(x.shape[0])
        if cond is None:
            return self.p_losses(x, None, t)
        if self.training and self.ucg_rate and isinstance(cond, list):
            drop = torch.rand(len(cond)) < self.ucg_rate
            cond = ["" if dropped else caption for caption, dropped in zip(cond, drop.tolist(), strict=True)]
        if self.training and self.personalised and isinstance(cond, list):
            self._captions_of_step.update(cond)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (self.personalised or self.cond_stage_trainable)
        ):
            encoded = self.get_learned_conditioning(cond)
        return self.p_losses(x, encoded, t)

    def regularise(self, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pull the vectors towards their initial words, by `embedding_reg_weight`."""
        if not (self.personalised and self.embedding_reg_weight > 0):
            return loss, {}
        distance = self.embedding_manager.embedding_to_coarse_loss().mean()
        return loss + self.embedding_reg_weight * distance, {"loss_emb_reg": distance}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Vectors whose word was in no caption of the step rest: no momentum or weight decay moves them.

        So each of several concepts goes the way that it would go if the others' pictures were not there.
        """
        captions, self._captions_of_step = self._captions_of_step, set()
        find = getattr(self.embedding_manager, "absent_parameters", None)
        parameters = list(self.embedding_manager.embedding_parameters()) if find else []
        if len(parameters) < 2 or not captions:
            return
        absent = {id(parameter) for parameter in find(captions)}
        if self.trainer.world_size > 1:  # what another process has seen has a gradient here too
            seen = torch.tensor(
                [id(p) not in absent for p in parameters], dtype=torch.int32, device=self.device
            )
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            absent = {id(p) for p, there in zip(parameters, seen.tolist(), strict=True) if not there}
        for parameter in parameters:
            if id(parameter) in absent:
                parameter.grad = None

    def after_optimizer_step(self, step: int) -> None:
        """The averages follow a denoiser that moves, and the manager counts."""
        if not self.personalised or self.unfreeze_model:
            super().after_optimizer_step(step)
        if self.personalised:
            self.embedding_manager.on_optimizer_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The vectors, and with `unfreeze_model` the denoiser at `model_lr`; or what is trained from scratch."""
        if self.personalised:
            groups = [{"params": list(self.embedding_manager.embedding_parameters())}]
            if self.unfreeze_model:
                groups.append({"params": list(self.model.parameters()), "lr": self.model_lr})
            return groups
        groups = super().parameter_groups()
        if self.cond_stage_trainable and self.cond_stage_model is not None:
            groups.append({"params": list(self.cond_stage_model.parameters())})
        return groups


def _trained(module: nn.Module) -> Iterator[bool]:
    return (parameter.requires_grad for parameter in module.parameters())
