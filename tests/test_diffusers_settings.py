"""Settings of diffusers' folders: what they mean here, and what is named because it cannot be read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm import diffusers_settings as settings
from ldm.models.diffusion.schedule import make_beta_schedule
from ldm.weights import CheckpointError, Folder
from tests.pipelines import UNETS

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    ],
)
def test_noise_schedules_are_those_of_diffusers(options) -> None:
    usual = {"beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.EulerDiscreteScheduler(**usual | options)
    params = settings.schedule_params(scheduler.config)
    kept = torch.tensor(np.cumprod(1 - betas_of(params)))
    torch.testing.assert_close(kept.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def betas_of(params: dict[str, Any]) -> np.ndarray:
    if params["given_betas"] is not None:
        return np.asarray(params["given_betas"])
    ends = (params.get("linear_start", 0.0), params.get("linear_end", 0.0))
    return make_beta_schedule(params["beta_schedule"], params["timesteps"], *ends)


@pytest.mark.parametrize("name", sorted({*settings._WITH_USUAL_BETAS, *settings._OTHER_BETAS}))
def test_what_a_scheduler_s_file_leaves_out_is_what_its_class_takes(name) -> None:
    kind = getattr(diffusers, f"{name}Scheduler")
    names = ("beta_start", "beta_end", "beta_schedule")
    known = inspect.signature(kind.__init__).parameters
    if not set(names) <= set(known):
        pytest.skip(f"{name} needs a package that is not installed")
    defaults = {key: known[key].default for key in names}
    expected = betas_of(settings.schedule_params(defaults))
    found = settings.schedule_params({"_class_name": f"{name}Scheduler"})
    np.testing.assert_array_equal(betas_of(found), expected)
    for key in names:  # each by itself
        rest = {other: defaults[other] for other in names if other != key}
        assert settings.schedule_params(rest, f"Flax{name}Scheduler") == found


def test_a_folder_s_class_of_scheduler_is_that_of_its_pipeline(tmp_path) -> None:
    left_out = {"beta_schedule": ..., "beta_start": ..., "beta_end": ..., "_class_name": "LCMScheduler"}
    folder = folder_of(tmp_path / "a", "sd1", scheduler=left_out)
    params = settings.folder_params(folder, "sd1")
    assert (params["linear_start"], params["beta_schedule"]) == (0.00085, "linear")
    (folder.path / "model_index.json").write_text('{"scheduler": ["diffusers", "PNDMScheduler"]}')
    params = settings.folder_params(Folder(folder.path), "sd1")
    assert (params["linear_start"], params["linear_end"]) == (0.0001, 0.02)
    assert params["beta_schedule"] == "sqrt_linear", "which is linear in diffusers"
    for name in ("MyScheduler", 3):
        left_out["_class_name"] = name
        folder = folder_of(tmp_path / str(name), "sd1", scheduler=left_out)
        with pytest.raises(
            CheckpointError, match=f"no beta_schedule, and what the class '{name}' .* write beta_sch"
        ):
            settings.folder_params(folder, "sd1")


def test_a_folder_without_a_scheduler_has_the_schedule_of_its_yaml(tmp_path) -> None:
    left_out = {"beta_schedule": ..., "beta_start": ..., "beta_end": ...}
    params = settings.folder_params(folder_of(tmp_path, "sd1", scheduler=left_out), "sd1")
    assert not {"linear_start", "beta_schedule", "timesteps", "given_betas"} & set(params)


def test_what_cannot_be_read_is_named() -> None:
    usual: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1} | UNETS["sd1"]
    for change, message in (
        ({"act_fn": "gelu"}, "the unet's act_fn is 'gelu'"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"block_out_channels": (32, 48)}, "no multiples of the first"),
        ({"layers_per_block": (1, 2)}, "layers_per_block differ per level"),
        (
            {"attention_head_dim": (4, 4, 2), "block_out_channels": (32, 64, 64)},
            "neither equal in number nor in width",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            settings.unet_params(usual | change)
    with pytest.raises(CheckpointError, match="AsymmetricAutoencoderKL"):
        settings.vae_params({"_class_name": "AsymmetricAutoencoderKL"})
    with pytest.raises(CheckpointError, match="beta_schedule is 'sigmoid'"):
        settings.schedule_params({"beta_schedule": "sigmoid"})


def folder_of(root: Path, family: str, **changes: dict[str, Any]) -> Folder:
    """A folder with settings and empty weights; `changes` are of the settings of its parts, ... removes one."""
    tower = {"hidden_act": "gelu", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    tower |= {"vocab_size": 49410, "max_position_embeddings": 77, "architectures": ["CLIPTextModel"]}
    parts: dict[str, dict[str, Any]] = {
        "unet": {"in_channels": 4, "out_channels": 4, "layers_per_block": 1} | UNETS[family],
        "vae": {"latent_channels": 4, "block_out_channels": [32], "layers_per_block": 1} | VAE_CHANNELS,
        "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "text_encoder": tower,
        "tokenizer": {},
    }
    if family == "sdxl":
        parts["text_encoder_2"] = tower | {"architectures": ["CLIPTextModelWithProjection"]}
    files = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    for part, config in parts.items():
        (root / part).mkdir(parents=True)
        own = {key: value for key, value in (config | changes.get(part, {})).items() if value is not ...}
        if own or part == "tokenizer":
            (root / part / files.get(part, "config.json")).write_text(json.dumps(own))
        (root / part / "model.safetensors").touch()
    return Folder(root)


VAE_CHANNELS = {"in_channels": 3, "out_channels": 3}


@pytest.mark.parametrize("family", UNETS)
def test_sizes_and_vocabulary_come_from_the_folder(tmp_path, family) -> None:
    params = settings.folder_params(folder_of(tmp_path, family), family)
    encoder = params["cond_stage_config"]["params"]
    if family == "sd1":
        assert "arch" not in encoder
    else:
        assert encoder["arch"] == {"width": 32, "heads": 4, "layers": 3, "vocabulary": 49410}
    assert params["first_stage_config"]["params"]["embed_dim"] == 4


@pytest.mark.parametrize(("index", "zero"), [({}, True), ({"force_zeros_for_empty_prompt": False}, False)])
def test_what_an_empty_negative_prompt_is_comes_from_the_folder(tmp_path, index, zero) -> None:
    folder = folder_of(tmp_path, "sdxl")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert settings.folder_params(folder, "sdxl")["zero_empty_negative"] is zero
    assert "zero_empty_negative" not in settings.folder_params(folder, "sd2")


# What other models' folders say, and what no folder may: (family, part, settings, a part of the message).
MISFITS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "LCM": ("sd1", "unet", {"time_cond_proj_dim": 256}, r"latent consistency models \(LCM\)"),
    "GLIGEN": ("sd1", "unet", {"attention_type": "gated"}, "as of GLIGEN"),
    "tiny-sd": ("sd1", "unet", {"mid_block_type": None}, "mid_block_type is None .as of distilled"),
    "Kolors": ("sdxl", "unet", {"encoder_hid_dim": 4096}, "as of Kolors"),
    "SSD-1B": ("sdxl", "unet", {"transformer_layers_per_block": [0, [2, 2]]}, "not one number per level"),
    "SSD-1B's other half": (
        "sdxl",
        "unet",
        {"reverse_transformer_layers_per_block": [[1, 1], [2]]},
        "reverse_transformer_layers_per_block",
    ),
    "video": ("sd1", "unet", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
    "DeepFloyd": ("sd1", "unet", {"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
    "blocks": ("sd1", "unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
    "no unet of ours": ("sd1", "unet", {"norm_eps": 1e-6}, "norm_eps is 1e-06"),
    "Playground 2.5": ("sdxl", "vae", {"latents_mean": [0.1] * 4}, "as of Playground 2.5"),
    "SD3": ("sd1", "vae", {"shift_factor": 0.06}, "as of Stable Diffusion 3"),
    "TAESD": ("sd1", "vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    "other vae": ("sd1", "vae", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    "16 channels": ("sd1", "vae", {"latent_channels": 16}, "16 channels and its unet 4"),
    "EDM": ("sdxl", "scheduler", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler .*CosXL"),
    "flow": ("sdxl", "scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
    "continuous": ("sdxl", "scheduler", {"timestep_type": "continuous"}, "not by betas"),
    "activation": ("sd2", "text_encoder", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    "second": ("sdxl", "text_encoder_2", {"hidden_act": "quick_gelu"}, "text_encoder_2's hidden_act"),
    "quantised": ("sdxl", "unet", {"quantization_config": {"load_in_4bit": True}}, "the unet is quantised"),
    "T5": ("sd1", "text_encoder", {"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel and not CLIP"),
    "no heads": ("sd2", "text_encoder", {"num_attention_heads": ...}, "lack 'num_attention_heads'"),
    "null": ("sd1", "unet", {"block_out_channels": None}, "settings are damaged"),
    "a text": ("sd1", "unet", {"block_out_channels": "x"}, "settings are damaged"),
    "betas in quotes": ("sd1", "scheduler", {"beta_start": "0.1"}, "settings are damaged .*betas from 0.1"),
    "steps in quotes": (
        "sd1",
        "scheduler",
        {"num_train_timesteps": "9"},
        "settings are damaged .*in 9 steps",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_folders_that_compute_something_else_are_named(tmp_path, case) -> None:
    family, part, change, message = MISFITS[case]
    with pytest.raises(CheckpointError, match=message) as error:
        settings.folder_params(folder_of(tmp_path, family, **{part: change}), family)
    text = str(error.value).replace(str(tmp_path), "")
    assert "; " in text and len(text) < 300 and "\n" not in text


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        ("sd1", "text_encoder/config.json", "has no text_encoder; download"),
        ("sd1", "text_encoder/model.safetensors", "weights of its text_encoder are missing"),
        ("sdxl", "text_encoder_2/config.json", "has no text_encoder_2; download"),
        ("sdxl", "text_encoder_2/model.safetensors", "weights of its text_encoder_2 are missing"),
        ("sd1", "vae/config.json", "has no vae/config.json; download"),
    ],
)
def test_an_unfinished_folder_says_what_is_missing(tmp_path, family, file, message) -> None:
    folder = folder_of(tmp_path, family)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        settings.folder_params(folder, family)
