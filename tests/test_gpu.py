"""What needs a CUDA device: the original's numbers on one, and runs of every method, recipe and precision.

`make test-gpu` runs them. The fast tests do not see a GPU; a tensor that was left on the CPU shows only here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from ldm.checkpoint import load_model_from_config
from ldm.generate import generate
from scripts import evaluate_model, txt2img
from tests.golden_record import CASES, Golden

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
MODEL = ROOT / "models/ldm/creatures"
FINETUNE = CONFIGS / "latent-diffusion/txt2img-finetune.yaml"
METHODS = sorted((CONFIGS / "personalization").glob("*.yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
WITH_MASKS, TWO = "core_masked", "two_concepts"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Versions of torch and Lightning that bring CUDA warn of other things than those of the fast tests.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def exact() -> Iterator[None]:
    """Float32 as the CPU computes it, not TensorFloat-32, which torch allows convolutions."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_original(case: str, exact) -> None:
    golden = Golden(case)
    model = golden.model().cuda().train()
    io = {name: value.cuda() for name, value in golden.io.items()}
    condition = model.get_learned_conditioning(golden.meta["train_prompts"])
    loss, _ = model.p_losses(io["loss_x0"], condition, io["loss_t"], noise=io["loss_noise"])
    loss.backward()
    assert loss.item() == pytest.approx(golden.meta["loss_value"], rel=2e-4)
    gradient = model.embedding_manager.string_to_param_dict["*"].grad
    assert (gradient - io["grad/*"]).abs().max() <= 2e-3 * io["grad/*"].abs().max()


def test_a_gpu_draws_what_the_processor_draws(exact) -> None:
    model = load_model_from_config(MODEL / "config.yaml", MODEL / "model.safetensors")
    prompt = ["a photo of a red bear on a blue background"] * 2
    (ours, _), (theirs, _) = (
        generate(model.to(device), prompt, steps=10, scale=3.0, seed=3) for device in ("cpu", "cuda")
    )
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 2


def learn(folder: Path, *words: object, steps: int = 4) -> Path:
    """Train for some steps as people do, and return the folder of the checkpoints."""
    command = ["--base", FINETUNE, *words, "-t", "-l", folder / "logs", "--gpus", "0,"]
    assert main.main([str(word) for word in [*command, "--max_steps", steps]]) == 0
    (run,) = (folder / "logs").iterdir()
    assert "on the CPU" not in (run / "run.log").read_text(encoding="utf-8")
    return run / "checkpoints"


def draw(folder: Path, *words: object) -> None:
    command = ["--outdir", folder, "--n_samples", "2", "--ddim_steps", "3", "--scale", "3", *words]
    assert txt2img.main([str(word) for word in command]) == 0
    assert list(folder.rglob("*.png"))


def learned(checkpoints: Path) -> dict[str, torch.Tensor]:
    """What a run has learned, from its state; every number is finite."""
    state = torch.load(checkpoints / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    return state


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_every_method_learns_and_draws(tmp_path: Path, monkeypatch, method: Path) -> None:
    monkeypatch.chdir(ROOT)
    images = ["--data_root", "data/concepts/zuzu", "--init_word", "creature"]
    if method.stem == TWO:
        images = []
    if method.stem == WITH_MASKS:
        masked = masked_copies(ROOT / "data/concepts/zuzu", tmp_path / "masked")
        images = ["--data_root", masked, "--init_word", "creature"]
    checkpoints = learn(tmp_path, method, CONFIGS / "recipes/fast.yaml", *images)
    assert learned(checkpoints)
    (file,) = [path for path in checkpoints.iterdir() if path.stem == "embeddings"]
    draw(tmp_path / "drawn", "--prompt", "a photo of (*:1.2)", "--embedding_path", file)


def masked_copies(source: Path, folder: Path) -> Path:
    """The images of a folder with the middle of each marked by its alpha channel."""
    from PIL import Image

    folder.mkdir()
    for path in sorted(source.glob("*.png")):
        with Image.open(path) as image:
            alpha = Image.new("L", image.size, 0)
            width, height = image.size
            alpha.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
            copy = image.convert("RGB")
            copy.putalpha(alpha)
            copy.save(folder / path.name)
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_learns(tmp_path: Path, monkeypatch, recipe: Path) -> None:
    monkeypatch.chdir(ROOT)
    checkpoints = learn(tmp_path, recipe, "--data_root", "data/concepts/bobo", "--init_word", "bear")
    assert learned(checkpoints)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
def test_every_precision_learns(tmp_path: Path, monkeypatch, precision: str) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--data_root", "data/concepts/bobo", "--init_word", "bear"]
    checkpoints = learn(tmp_path, *words, f"lightning.trainer.precision={precision}")
    assert learned(checkpoints)


@pytest.mark.parametrize("graph", [False, True])
def test_a_compiled_run_learns(tmp_path: Path, monkeypatch, graph: bool) -> None:
    monkeypatch.chdir(ROOT)
    compiled = "lightning.callbacks.compiled.params"
    words = [f"{compiled}.least_steps=0", f"{compiled}.graph={str(graph).lower()}"]
    checkpoints = learn(tmp_path, "--data_root", "data/concepts/bobo", "--init_word", "bear", *words)
    assert learned(checkpoints)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch) -> None:
    """Up to what GPU kernels may round differently from one run to the next."""
    monkeypatch.chdir(ROOT)
    words = ["--data_root", "data/concepts/bobo", "--init_word", "bear"]
    whole = learned(learn(tmp_path / "whole", *words))
    half = learn(tmp_path / "half", *words, steps=2)
    assert main.main(["-r", str(half.parent), "-t", "--max_steps", "4"]) == 0
    name = "embedding_manager.string_to_param_dict.*"
    moved = whole[name] - whole["embedding_manager.initial_embeddings.*"]
    assert (learned(half)[name] - whole[name]).abs().max() < 0.02 * moved.abs().max()


def test_learned_words_are_scored(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [CONFIGS / "recipes/fast.yaml", "--data_root", "data/concepts/bobo", "--init_word", "bear"]
    file = learn(tmp_path, *words) / "embeddings.pt"
    command = ["--embedding_path", file, "--concept", "data/concepts/bobo", "--outdir", tmp_path / "scores"]
    few = ["--samples", "2", "--ddim_steps", "3"]
    assert evaluate_model.main([str(word) for word in [*command, *few]]) == 0
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text(encoding="utf-8"))


def test_images_are_edited(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    image = ROOT / "data/concepts/bobo/01.png"
    draw(tmp_path, "--prompt", "a photo of a bear", "--init_img", image, "--strength", "0.5")
