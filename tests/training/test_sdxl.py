"""A word is trained on a small Stable Diffusion XL from a single file, resumed, and drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.commands import generate as generate_command
from ldm.models.diffusion.sdxl import LatentDiffusionXL
from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import golden_state, sdxl_node
from tests.training.runs import equal, killed_at, only_run, start, state_of

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "low-memory.yaml"


@pytest.fixture
def xl_yaml(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML that trains a word of two vectors for 4 steps, with a file of weights beside it."""
    options = {"num_vectors_per_token": 2, "norm_control": "fixed"}
    node = sdxl_node(personalization_config={"params": options})
    with skip_pretrained():
        model = instantiate_from_config(node)
    save_file(golden_state(model), tmp_path / "model.safetensors")
    dataset = {"target": "ldm.data.personalized.PersonalizedBase"}
    params = {"size": 16, "repeats": 2, "zooms": [1.0, 2.0]}
    data = {"batch_size": 2, "num_workers": 0, "train": {**dataset, "params": params}}
    previews = {"batch_frequency": 4, "max_images": 1, "log_images_kwargs": {"ddim_steps": 1}}
    config = {
        "model": node,
        "data": {"target": "main.DataModuleFromConfig", "params": data},
        "lightning": {
            "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": previews}},
            "trainer": {"max_steps": 4},
        },
        "actual_resume": str(tmp_path / "model.safetensors"),
        "data_root": str(image_folder),
        "placeholder_string": "<cat>",
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "xl.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "xl.yaml"


def test_a_word_is_trained_on_a_file_resumed_and_drawn(xl_yaml: Path, copy_states, capsys) -> None:
    sphere = "model.params.optimizer_config.target=ldm.models.optimizers.SphereSGD"
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    assert start("--base", xl_yaml, "-t", "--accelerator", "cpu", sphere, every) == 0
    out = capsys.readouterr().out
    assert "4 steps of batch 2" in out and "'<cat>' (2 vectors)" in out
    run = only_run()
    whole = state_of(run)
    assert start("-r", killed_at(run, 2), "-t") == 0
    resumed = state_of(run.with_name("killed-2"))
    assert all(equal(whole[part], resumed[part]) for part in ("state_dict", "optimizer_states"))
    whole = whole["state_dict"]
    vectors = whole["embedding_manager.string_to_param_dict.<cat>"]
    begun = whole["embedding_manager.initial_embeddings.<cat>"]
    # Both towers' parts have turned by the same angle, and kept their norms.
    for now, before in zip(vectors.split(32, dim=1), begun.split(32, dim=1), strict=True):
        angles = torch.cosine_similarity(now, before).arccos()
        assert (angles > 1e-3).all() and (angles < 5e-2).all()
        torch.testing.assert_close(now.norm(dim=1), before.norm(dim=1))

    assert load_file(run / "checkpoints" / "cat.safetensors")["emb_params"].shape == (2, 64)
    capsys.readouterr()
    model, config = xl_yaml.with_name("model.safetensors"), next((run / "configs").glob("*-project.yaml"))
    words = ["--ckpt_path", str(model), "--config", str(config), "--ddim_steps", "2", "--n_samples", "1"]
    words += ["--embedding_path", str(run / "checkpoints" / "cat.safetensors"), "--prompt", "a (<cat>:1.2)"]
    assert generate_command.main([*words, "--original_size", "512", "768", "--precision", "autocast"]) == 0
    assert "samples/0000.png" in capsys.readouterr().out
    assert generate_command.main([*words, "--crop", "-1", "0"]) == 1
    assert capsys.readouterr().err == "error: --crop is -1 0; use two numbers from 0\n"


def test_with_little_memory(xl_yaml: Path, capsys, monkeypatch) -> None:
    """The recipe keeps half of the bits of frozen layers, activations of one layer, and no first stage at a step."""
    seen: list[tuple[torch.dtype, bool, torch.dtype]] = []
    apply = LatentDiffusionXL.apply_model

    def watched(self, *arguments, **options):
        block = self.model.diffusion_model.input_blocks[1][0]
        first_stage = self.first_stage_model.quant_conv.weight
        seen.append((block.in_layers[2].weight.dtype, block.use_checkpoint, first_stage.dtype))
        return apply(self, *arguments, **options)

    monkeypatch.setattr(LatentDiffusionXL, "apply_model", watched)
    assert start("--base", xl_yaml, RECIPE, "-t", "--accelerator", "cpu", "--max_steps", 1) == 0
    assert seen[-1] == (torch.bfloat16, True, torch.float32)
    out = capsys.readouterr().out
    assert "encoded 12 images once" in out
    assert re.search("learning rate .*1 x 2|accumulat", out)
