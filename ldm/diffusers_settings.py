"""Settings of a model in the layout of diffusers as parameters of ours, and back; what cannot be read is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.model_kinds import OTHER_MODEL, Prediction
from ldm.util import shown
from ldm.weights import CheckpointError, Folder

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# Names of noise schedules: diffusers' -> LDM's.
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}
# What the classes of diffusers take where a scheduler_config.json leaves it out: first beta, last beta, schedule.
_USUAL_BETAS = (0.0001, 0.02, "linear")
_OTHER_BETAS = {
    **dict.fromkeys(
        ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"),
        (0.00085, 0.012, "linear"),
    ),
    **dict.fromkeys(("LCM", "TCD"), (0.00085, 0.012, "scaled_linear")),
}
_WITH_USUAL_BETAS = frozenset((
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "LMSDiscrete", "PNDM", "RePaint", "SASolver", "UniPCMultistep",
))  # fmt: skip


def unet_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `UNetModel` that a unet's config.json describes.

    Raises:
        CheckpointError: the unet has something that `UNetModel` lacks.
    """
    _check_usual("unet", config, _USUAL_UNET)
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise CheckpointError(
            f"the unet's addition_embed_type is {config['addition_embed_type']!r}; {OTHER_MODEL}"
        )
    channels = list(config["block_out_channels"])
    if any(count % channels[0] for count in channels):
        raise CheckpointError(
            f"the unet's block_out_channels {channels} are no multiples of the first; {OTHER_MODEL}"
        )
    down = list(config["down_block_types"])
    up = list(config.get("up_block_types") or [kind.replace("Down", "Up") for kind in reversed(down)])
    if not {*down} <= _BLOCKS or up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise CheckpointError(f"the unet's blocks are {', '.join([*down, *up])}; {OTHER_MODEL}")
    blocks, context = _uniform(config, "layers_per_block"), _uniform(config, "cross_attention_dim")
    # What diffusers calls attention_head_dim is the number of heads, unless num_attention_heads is given.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    per_level = list(heads) if isinstance(heads, (list, tuple)) else [heads] * len(channels)
    widths = {count // number for count, number in zip(channels, per_level, strict=True)}
    if len(set(per_level)) == 1:
        attention = {"num_heads": per_level[0], "num_head_channels": -1}
    elif len(widths) == 1:
        attention = {"num_heads": -1, "num_head_channels": widths.pop()}
    else:
        raise CheckpointError(
            f"the unet's heads {per_level} are neither equal in number nor in width; {OTHER_MODEL}"
        )
    depth = config.get("transformer_layers_per_block", 1)
    if isinstance(depth, (list, tuple)) and not all(isinstance(count, int) for count in depth):
        raise CheckpointError(
            f"the unet's transformer_layers_per_block is {depth}, not one number per level; {OTHER_MODEL}"
        )
    params = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [count // channels[0] for count in channels],
        "num_res_blocks": blocks,
        "attention_resolutions": [2**level for level, kind in enumerate(down) if "CrossAttn" in kind],
        "context_dim": context,
        "transformer_depth": list(depth) if isinstance(depth, (list, tuple)) else depth,
        "use_spatial_transformer": True,
        "use_scale_shift_norm": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "legacy": False,
        **attention,
    }
    if config.get("use_linear_projection"):
        params["use_linear_in_transformer"] = True
    if config.get("addition_embed_type") == "text_time":
        params |= {
            "num_classes": "sequential",
            "adm_in_channels": config["projection_class_embeddings_input_dim"],
        }
    return params


_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D"}
# Options of diffusers' classes that change what they compute, with the values that all Stable Diffusion models have.
# None, 0 and False stand for the same: the option is off.
_USUAL_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_USUAL_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
# Of a text tower that is kept in OpenCLIP's layout.
_USUAL_TOWER: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 77}
# Which models have such an option.
_OWNERS = {
    "attention_type": "GLIGEN",
    "class_embed_type": "unCLIP",
    "encoder_hid_dim": "Kolors",
    "latents_mean": "Playground 2.5",
    "latents_std": "Playground 2.5",
    "mid_block_type": "distilled models",
    "shift_factor": "Stable Diffusion 3 and Flux",
    "time_cond_proj_dim": "latent consistency models (LCM)",
    "use_quant_conv": "Stable Diffusion 3 and Flux",
}


def _check_usual(part: str, config: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Check that no option of a part's config.json changes what is computed; CheckpointError names the first."""
    if config.get("quantization_config"):
        raise CheckpointError(f"the {part} is quantised; name a folder with its weights in half precision")
    for key, value in usual.items():
        own = config.get(key, value)
        if (own or None) != (value or None):
            owner = f" (as of {_OWNERS[key]})" if key in _OWNERS else ""
            raise CheckpointError(f"the {part}'s {key} is {own!r}{owner} and not {value!r}; {OTHER_MODEL}")


def _uniform(config: Mapping[str, Any], key: str) -> Any:
    """A setting that may be given per level, but is the same at all of them."""
    value = config[key]
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(set(values)) != 1:
        raise CheckpointError(f"the unet's {key} differ per level ({values}); {OTHER_MODEL}")
    return values[0]


def unet_settings(
    params: Mapping[str, Any], image_size: int | Sequence[int], size_width: int = 0
) -> dict[str, Any]:
    """The config of diffusers' UNet2DConditionModel for the parameters of `UNetModel`, all given.

    `size_width` is how wide Stable Diffusion XL embeds each size.
    """
    channels = [params["model_channels"] * factor for factor in params["channel_mult"]]
    attended = [2**level in params["attention_resolutions"] for level in range(len(channels))]
    heads: Any = params["num_heads"]
    if params["num_head_channels"] != -1:
        heads = [count // params["num_head_channels"] for count in channels]
    settings: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)],
        "cross_attention_dim": params["context_dim"],
        "attention_head_dim": heads,
        "transformer_layers_per_block": params["transformer_depth"],
        "use_linear_projection": bool(params.get("use_linear_in_transformer")),
        "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm") else "default",
    }
    if params.get("num_classes") == "sequential":
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": size_width,
            "projection_class_embeddings_input_dim": params["adm_in_channels"],
        }
    return settings


def vae_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `embed_dim` and `ddconfig` of `AutoencoderKL` that a vae's config.json describes.

    Raises:
        CheckpointError: the vae is of another kind.
    """
    _check_usual("vae", config, _USUAL_VAE)
    usual = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    blocks = {*(config.get("down_block_types") or ()), *(config.get("up_block_types") or ())}
    if blocks - usual:
        raise CheckpointError(f"the vae has the block {min(blocks - usual)}; {OTHER_MODEL}")
    channels = list(config["block_out_channels"])
    latent = config["latent_channels"]
    return {
        "embed_dim": latent,
        "ddconfig": {
            "double_z": True,
            "z_channels": latent,
            "resolution": config.get("sample_size", 256),
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": channels[0],
            "ch_mult": [count // channels[0] for count in channels],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
            "num_groups": config.get("norm_num_groups", 32),
        },
    }


def vae_settings(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """The config of diffusers' AutoencoderKL for the `ddconfig` of ours, with all parameters given."""
    channels = [params["ch"] * factor for factor in params["ch_mult"]]
    return {
        "sample_size": params["resolution"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_ch"],
        "latent_channels": params["z_channels"],
        "block_out_channels": channels,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": params["num_groups"],
        "scaling_factor": scale_factor,
    }


def schedule_params(config: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """The parameters of the noise schedule that a scheduler_config.json describes.

    Args:
        config: what it holds; what is not there is what the scheduler's class takes for it.
        kind: the class of the scheduler; by default the one that the file names.
    Raises:
        CheckpointError: the schedule is unknown, or is not one of betas.
    """
    kind = kind or str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")) or config.get("timestep_type") == "continuous":
        raise CheckpointError(
            f"the scheduler is {kind} with noise that is scaled otherwise (as of Playground 2.5, CosXL and Stable "
            f"Diffusion 3), not by betas; {OTHER_MODEL}"
        )
    steps = config.get("num_train_timesteps", 1000)
    params: dict[str, Any] = {"timesteps": steps, "given_betas": None}
    betas: Any = config.get("trained_betas")
    schedule = None if betas is not None else _beta_setting(config, kind, "beta_schedule")
    if schedule == "squaredcos_cap_v2":
        params["beta_schedule"] = "cosine"
    elif schedule in SCHEDULES:
        start, end = (_beta_setting(config, kind, name) for name in ("beta_start", "beta_end"))
        if not (isinstance(start, int | float) and isinstance(end, int | float) and isinstance(steps, int)):
            raise TypeError(f"betas from {start} to {end} in {steps} steps are no numbers")
        params |= {"beta_schedule": SCHEDULES[schedule], "linear_start": start, "linear_end": end}
    elif betas is None:
        raise CheckpointError(
            f"the scheduler's beta_schedule is '{schedule}'; known are {', '.join(SCHEDULES)}"
        )
    if schedule != "squaredcos_cap_v2" and config.get("rescale_betas_zero_snr"):
        params["given_betas"] = _without_signal_at_end(params, betas, squared=schedule == "scaled_linear")
    elif config.get("trained_betas") is not None:
        params["given_betas"] = list(betas)
    return params


def _beta_setting(config: Mapping[str, Any], kind: str, name: str) -> Any:
    """A setting of the betas: what the file says, else what the scheduler's class takes.

    Raises:
        CheckpointError: the file leaves it out, and the class is not known.
    """
    if name in config:
        return config[name]
    own = kind.removeprefix("Flax").removesuffix("Scheduler")
    defaults = _USUAL_BETAS if own in _WITH_USUAL_BETAS else _OTHER_BETAS.get(own)
    if defaults is None:
        raise CheckpointError(
            f"its scheduler_config.json has no {name}, and what the class '{shown(kind)}' takes for it is not known; "
            f"write {name} into the file"
        )
    return dict(zip(("beta_start", "beta_end", "beta_schedule"), defaults, strict=True))[name]


def _without_signal_at_end(
    schedule: Mapping[str, Any], given: Sequence[float] | None, *, squared: bool
) -> list[float]:
    """Betas rescaled so that almost no signal is left at the last step (Lin et al. 2024, algorithm 1).

    They are those given, or those of a schedule, linear in their roots if it is `squared`. As in diffusers, 2^-24 of
    the signal is left, because noise cannot be computed from none.
    """
    import numpy as np  # a fifth of a second, which few models need

    if given is not None:
        betas = np.asarray(given)
    elif squared:
        start, end = schedule["linear_start"] ** 0.5, schedule["linear_end"] ** 0.5
        betas = np.linspace(start, end, schedule["timesteps"]) ** 2
    else:
        betas = np.linspace(schedule["linear_start"], schedule["linear_end"], schedule["timesteps"])
    signal = np.cumprod(1 - betas) ** 0.5
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    kept = signal**2
    kept[-1] = 2.0**-24
    rescaled: list[float] = (1 - kept / np.append(1.0, kept[:-1])).tolist()
    return rescaled


# -- folders ----------------------------------------------------------------------------------------------------


def folder_params(folder: Folder, family: str) -> dict[str, Any]:
    """The parameters of LatentDiffusion that the settings in a folder of diffusers describe.

    The value of `unet_config`, `first_stage_config` or `cond_stage_config` is to be merged into that node.

    Raises:
        CheckpointError: a setting is missing, or describes what cannot be read.
    """
    unet, vae, scheduler = (folder.config(part) for part in ("unet", "vae", "scheduler"))
    try:
        if not vae and folder.weights("vae"):
            raise CheckpointError("it has no vae/config.json; download it completely")
        # A folder without a scheduler has the schedule of its family, which is in the YAML.
        noise = schedule_params(scheduler, _scheduler_class(folder)) if scheduler else {}
        params: dict[str, Any] = noise | {
            "channels": unet["in_channels"],
            "image_size": unet.get("sample_size") or 64,
            "unet_config": {"params": unet_params(unet)},
        }
        if vae:
            params["scale_factor"] = vae.get("scaling_factor", 0.18215)
            params["scale_by_std"] = False
            params["first_stage_config"] = {"params": vae_params(vae)}
            if vae["latent_channels"] != unet["in_channels"]:
                raise CheckpointError(
                    f"its vae has {vae['latent_channels']} channels and its unet {unet['in_channels']}; download it "
                    "again"
                )
        params["cond_stage_config"] = {"params": _encoder_params(folder, family)}
        if family == "sdxl":
            params["zero_empty_negative"] = folder.index().get("force_zeros_for_empty_prompt") is not False
    except CheckpointError as error:
        raise CheckpointError(f"'{folder.path}': {error}") from error
    except KeyError as error:
        raise CheckpointError(f"'{folder.path}': its settings lack {error}; download it again") from error
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"'{folder.path}': its settings are damaged ({error}); download it again"
        ) from error
    return params


def _scheduler_class(folder: Folder) -> str:
    """The class that a pipeline of the folder takes for its scheduler; "" where that is not said."""
    named = folder.index().get("scheduler")
    return named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else ""


def _encoder_params(folder: Folder, family: str) -> dict[str, Any]:
    config = _text_config(folder, "text_encoder")
    path = folder.path / "tokenizer"
    if not path.is_dir():
        raise CheckpointError("it has no tokenizer; download it completely")
    own = Folder(path)._json("tokenizer_config.json").get("model_max_length", 77)
    positions = config.get("max_position_embeddings", 77)
    params: dict[str, Any] = {"tokenizer": str(path), "max_length": min(int(own), positions)}
    if family == "sd2":
        return params | {"arch": _arch("text_encoder", config), "layer": "last"}
    params["version"] = str(folder.path / "text_encoder")
    if family == "sdxl":
        params["arch"] = _arch("text_encoder_2", _text_config(folder, "text_encoder_2"))
    return params


def _text_config(folder: Folder, part: str) -> dict[str, Any]:
    """The config.json of a text encoder; CheckpointError if it, or its weights, are missing or not CLIP's."""
    config = folder.config(part)
    if not config:
        raise CheckpointError(f"it has no {part}; download it completely")
    kind = str(next(iter(config.get("architectures") or ()), "CLIPTextModel"))
    if not kind.startswith("CLIPText"):
        raise CheckpointError(f"the {part} is a {kind} and not CLIP; {OTHER_MODEL}")
    if not folder.weights(part):
        raise CheckpointError(f"the weights of its {part} are missing; download it completely")
    return config


def _arch(part: str, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a text tower in OpenCLIP's layout, from the config.json of transformers' CLIP."""
    _check_usual(part, config, _USUAL_TOWER)
    sizes = {"width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
    sizes["vocabulary"] = "vocab_size"
    return {name: config[key] for name, key in sizes.items()}


def zero_snr_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the noise schedule of a YAML, rescaled so that no signal is left at the last step."""
    ends = {"beta_start": params["linear_start"], "beta_end": params["linear_end"]}
    steps = {"num_train_timesteps": params.get("timesteps", 1000)}
    return schedule_params({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True} | ends | steps)
