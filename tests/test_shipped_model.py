"""The shipped model: prompts obeyed, a concept inverted by the commands as people type them."""

from __future__ import annotations

import colorsys
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from ldm.base_models import read_config
from ldm.checkpoint import load_model_from_config, read_state_dict, save_state_dict
from ldm.commands.base import load_latent_diffusion
from ldm.evaluation.appearance import palette_overlap
from ldm.generate import generate
from ldm.images import list_images, open_image
from ldm.models.features import load_features
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.training.callbacks.warm_start import end_states
from ldm.util import UserError
from scripts import txt2img

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/ldm/creatures"
FINETUNE = "configs/latent-diffusion/txt2img-finetune.yaml"

pytestmark = pytest.mark.skipif(
    not (MODEL / "model.safetensors").is_file(), reason="the embedded model is not in this checkout"
)


def corner_hues(picture: Image.Image) -> list[float]:
    pixels = np.asarray(picture, dtype=float) / 255
    size = len(pixels)
    corners = [pixels[y, x] for y in (1, size - 2) for x in (1, size - 2)]
    return [colorsys.rgb_to_hsv(*corner)[0] for corner in corners]


@pytest.fixture(scope="module")
def model():
    return load_model_from_config(MODEL / "config.yaml", MODEL / "model.safetensors")


@pytest.mark.parametrize(("color", "hue"), [("blue", 0.62), ("green", 0.35), ("pink", 0.93)])
def test_backgrounds_are_obeyed(model, color: str, hue: float) -> None:
    prompts = [f"a photo of a yellow fish on a {color} background"] * 6
    pictures = generate(model, prompts, steps=12, scale=3.0, sampler="dpm_solver", seed=0)
    away = [abs((h - hue + 0.5) % 1 - 0.5) for picture in pictures for h in corner_hues(picture)]
    assert np.mean(np.array(away) < 0.1) > 0.8


def test_the_used_by_commands_invert_and_generate(tmp_path: Path, monkeypatch) -> None:
    """Fewer steps than people take; the pictures must share more colours with the concept than the plain word's."""
    monkeypatch.chdir(ROOT)
    _invert(tmp_path, "--gpus", "0,")
    (embeddings,) = tmp_path.glob("logs/*/checkpoints/embeddings.pt")
    learned = _pictures(tmp_path / "learned", "a photo of *", "--embedding_path", str(embeddings))
    plain = _pictures(tmp_path / "plain", "a photo of a creature")
    concept = [open_image(path) for path in list_images("data/concepts/zuzu")]
    assert palette_overlap(learned, concept) > palette_overlap(plain, concept) + 0.1


def test_the_text_encoder_is_that_of_the_towers(model) -> None:
    """What a warm start makes of the encoder's states must be what the picture tower was trained against."""
    features = load_features(MODEL / "towers", "cpu")
    manager = EmbeddingManager(model.cond_stage_model, ["*"], ["yellow fish"], num_vectors_per_token=2)
    states = end_states(model.cond_stage_model, manager, ["a photo of a * on a beach", "a fish"])
    wanted = features.text(["a photo of a yellow fish on a beach", "a fish"])
    assert (features.of_states(states) * wanted).sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=2e-3)


def _invert(folder: Path, *flags: str) -> None:
    command = ["--base", FINETUNE, "-t", "-l", str(folder / "logs"), "--data_root", "data/concepts/zuzu"]
    limits = ["--init_word", "creature", "--max_steps", "80", "lightning.callbacks.image_logger=null"]
    assert main.main([*command, *limits, *flags]) == 0


def _pictures(folder: Path, prompt: str, *flags: str) -> list[Image.Image]:
    command = ["--prompt", prompt, "--outdir", str(folder), "--n_samples", "8", "--dpm_solver", "--seed", "1"]
    assert txt2img.main([*command, "--ddim_steps", "12", "--scale", "3", "--skip_grid", *flags]) == 0
    return [open_image(path) for path in list_images(folder / "samples")]


def test_it_is_used_from_any_folder(tmp_path, monkeypatch) -> None:
    """The YAML names the text encoder from the root of the checkout; it is found from the model's folder too."""
    monkeypatch.chdir(tmp_path)
    config = read_config(str(MODEL / "model.safetensors"), None)
    assert (
        load_latent_diffusion(config, str(MODEL / "model.safetensors"), "cpu").cond_stage_model.width == 128
    )
    moved = tmp_path / "moved"
    shutil.copytree(MODEL / "text_encoder", moved / "text_encoder")
    for name in ("model.safetensors", "config.yaml"):
        shutil.copy(MODEL / name, moved)
    config = read_config(str(moved / "model.safetensors"), None)
    assert config.model.params.cond_stage_config.params.version == str(moved / "text_encoder")
    load_latent_diffusion(config, str(moved / "model.safetensors"), "cpu")


def test_an_incomplete_copy_is_not_blamed_on_the_config(tmp_path) -> None:
    state = read_state_dict(MODEL / "model.safetensors")
    del state["model.diffusion_model.out.2.bias"]
    save_state_dict(state, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="it is the embedded model.*as the config says, but incomplete"):
        load_model_from_config(MODEL / "config.yaml", tmp_path / "cut.safetensors")
