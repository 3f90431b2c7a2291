"""Shipped YAMLs in training: the recipes, and the stages of the embedded model with small parts, three steps each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import main
from ldm.checkpoint import read_state_dict, save_state_dict
from ldm.models.two_towers import TwoTowers
from ldm.training import command_line, config
from ldm.training.callbacks.checkpoint import LastCheckpoint

ROOT = Path(main.__file__).parent
CONFIGS = ROOT / "configs"


RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))


BASES = [*CONFIGS.glob("latent-diffusion/*finetune*.yaml"), *CONFIGS.glob("stable-diffusion/*finetune*.yaml")]


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits(recipe, base):
    options = command_line.parse(["--base", str(base), str(recipe), "--data_root", "x"])
    merged = config.load_run_config(options, options.base)
    config.check_run_config(merged)
    # A recipe changes values and removes no part.
    for key in ("model.params.first_stage_config.target", "data.params.train.target"):
        assert OmegaConf.select(merged, key) == OmegaConf.select(OmegaConf.load(base), key)


PERSONALIZATIONS = sorted((CONFIGS / "personalization").glob("*.yaml"))


@pytest.mark.parametrize("personalization", PERSONALIZATIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_any_personalization(recipe, personalization):
    """Before torch is imported and after, in both orders."""
    plain = "EmbeddingManager" in OmegaConf.load(personalization).model.params.personalization_config.get(
        "target", "EmbeddingManager"
    )
    overlays = [[recipe, personalization], [personalization, recipe]]
    # It controls the norm of vectors, which methods do not have.
    if recipe.stem == "direction" and not plain:
        overlays.pop()
    for overlay in overlays:
        base = [CONFIGS / "latent-diffusion" / "txt2img-finetune.yaml", *overlay]
        words = [
            "--init_word",
            "bear",
            "data.params.train.params.mask_weight=null",
        ]  # these images have no masks
        options = command_line.parse(["--base", *map(str, base), *words])
        config.check_command_line(options)
        config.check_run_config(config.load_run_config(options, options.base))


def test_learning_rate_of_the_paper():
    paper = OmegaConf.load(CONFIGS / "recipes" / "paper.yaml")
    batch = paper.data.params.batch_size * paper.lightning.trainer.accumulate_grad_batches
    assert batch * paper.model.base_learning_rate == pytest.approx(0.04)
    assert paper.lightning.trainer.max_steps == 5000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe, tiny_yaml, capsys):
    assert main.main(["--base", str(tiny_yaml), str(recipe), "-t", "--max_steps", "2"]) == 0
    assert "ended at step 2" in capsys.readouterr().out.splitlines()[-1]


TEXT_ENCODER = ROOT / "models" / "ldm" / "creatures" / "text_encoder"


TOWER = {"target": "ldm.models.two_towers.ResidualTower", "params": {"channels": [8], "width": 16}}


SMALL_AUTOENCODER = ("ddconfig.ch=8", "ddconfig.ch_mult=[1,1,1]")


def train(stage: str, *words: str) -> Path:
    """Run three steps of a stage in the working directory and return its run folder."""
    small = [f"data.params.{split}.params.count=8" for split in ("train", "validation")]
    small += [
        "data.params.batch_size=4",
        "--max_steps",
        "3",
        "lightning.trainer.precision=32-true",
        "-l",
        stage,
    ]
    yaml = ROOT / "configs" / "creatures" / f"{stage}.yaml"
    assert main.main(["-b", str(yaml), "-t", "--scale_lr", "false", *small, *words]) == 0
    (run,) = Path(stage).iterdir()
    return run


def weights(run: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    state = read_state_dict(run / "checkpoints" / "last.ckpt")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_first_stage_and_denoiser_with_its_text_encoder() -> None:
    run = train("first-stage", *(f"model.params.{word}" for word in SMALL_AUTOENCODER))
    first_stage = {key: value for key, value in weights(run).items() if not key.startswith("loss.")}
    assert list((run / "images" / "train").glob("reconstruction_gs-000001*.jpg"))
    save_state_dict(first_stage, "build/creatures/first-stage.safetensors")
    TwoTowers(TEXT_ENCODER, TOWER).save("clip")
    before = read_state_dict("clip/text_encoder/model.safetensors")

    run = train(
        "ldm",
        *(f"model.params.first_stage_config.params.{word}" for word in SMALL_AUTOENCODER),
        "model.params.unet_config.params.model_channels=32",
        "model.params.cond_stage_config.params.version=clip/text_encoder",
        "model.params.cond_stage_trainable=true",
    )
    kept, after = (
        weights(run, "first_stage_model."),
        weights(run, "cond_stage_model.transformer."),
    )
    assert all(torch.equal(kept[key], value) for key, value in first_stage.items())
    assert any(not torch.equal(after[key], value) for key, value in before.items()), "the text encoder learns"
    assert weights(run)["scale_factor"] != 1
    assert weights(run)["model_ema.num_updates"] == 3
    assert list((run / "images" / "train").glob("samples_scaled_gs-000001*.jpg"))


def test_a_resumed_first_stage_is_the_one_that_was_never_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    save = LastCheckpoint.save_now

    def save_and_copy(self: LastCheckpoint, trainer: pl.Trainer) -> None:
        save(self, trainer)
        if trainer.global_step == 2:
            shutil.copytree(self.path.parents[1], "killed", dirs_exist_ok=True)

    monkeypatch.setattr(LastCheckpoint, "save_now", save_and_copy)
    small = [f"model.params.{word}" for word in SMALL_AUTOENCODER]
    run = train(
        "first-stage", *small, "lightning.modelcheckpoint.params.every_n_train_steps=1", "--max_steps", "4"
    )
    early = weights(Path("killed"))
    assert main.main(["-r", "killed", "-t"]) == 0
    straight, resumed = weights(run), weights(Path("killed"))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert len({0.0, early["loss.logvar"].item(), straight["loss.logvar"].item()}) == 3, "it is trained"


def test_text_encoder() -> None:
    words = [f"model.params.image_tower.params.{key}={value}" for key, value in TOWER["params"].items()]
    train("clip", *words, f"model.params.text_encoder={TEXT_ENCODER}", "model.params.export_to=towers")
    features = TwoTowers.load("towers").text_features(["a photo of a cat", "a dog"])
    assert features.shape == (2, 128)
