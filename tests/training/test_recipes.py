"""The fragments of configs/recipes fit over every finetuning YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from ldm.training import command_line, config
from ldm.training.trainer import OLD_TRAINER_KEYS

CONFIGS = Path(main.__file__).parent / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
BASES = [*CONFIGS.glob("latent-diffusion/*finetune*.yaml"), *CONFIGS.glob("stable-diffusion/*finetune*.yaml")]


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits(recipe, base):
    options = command_line.parse(["--base", str(base), str(recipe), "--data_root", "x"])
    merged = config.load_run_config(options, options.base)
    config.check_run_config(merged, [*command_line.trainer_options(), *OLD_TRAINER_KEYS])
    # It changes values, and takes away no part.
    for key in ("model.params.first_stage_config.target", "data.params.train.target"):
        assert OmegaConf.select(merged, key) == OmegaConf.select(OmegaConf.load(base), key)


def test_the_papers_rate():
    paper = OmegaConf.load(CONFIGS / "recipes" / "paper.yaml")
    batch = paper.data.params.batch_size * paper.lightning.trainer.accumulate_grad_batches
    assert batch * paper.model.base_learning_rate == pytest.approx(0.04)
    assert paper.lightning.trainer.max_steps == 5000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, tiny_yaml, capsys):
    assert main.main(["--base", str(tiny_yaml), str(recipe), "-t", "--max_steps", "2"]) == 0
    assert "ended at step 2" in capsys.readouterr().out.splitlines()[-1]
