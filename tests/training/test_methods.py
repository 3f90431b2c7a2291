"""Runs with the methods of `ldm.modules.methods`: training with previews, files, and resuming bit for bit."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.embeddings.method_files import read_words, triggers_of
from tests.training.runs import only_run, start, state_of

METHODS = {
    "ProSpect": {"stages": 3},
    "XTI": {},
    "NeTI": {"features": 16, "hidden": 8},
    "OutputResidual": {"learn_input": True, "residual_rate": 1e-3},
    "CoRe": {"initializer_words": ["cat"]},
    "DreamArtist": {"negative_vectors": 2},
    "Grid": {"stages": 3, "layers": True, "residual_layers": True, "residual_rate": 1e-3},
    "CoReGrid": {"stages": 3, "initializer_words": ["cat"]},
    "CoReNeTI": {"features": 16, "hidden": 8, "initializer_words": ["cat"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_resumed_bit_for_bit(tiny_yaml, method, capsys) -> None:
    node = {
        "target": f"ldm.modules.methods.{method}",
        "params": {"placeholder_strings": ["*"], **METHODS[method]},
    }
    OmegaConf.save(OmegaConf.create({"model": {"params": {"personalization_config": node}}}), "own.yaml")
    images = "lightning.callbacks.image_logger.params"
    words = ["--base", tiny_yaml, "own.yaml", "-t", "--seed", 1, f"{images}.batch_frequency=2"]
    words += [f"{images}.log_images_kwargs.ddim_steps=1", f"{images}.max_images=1"]
    words += ["lightning.callbacks.deterministic_loss.params.every_n_train_steps=1"]
    assert start(*words, "-l", "whole", "--max_steps", 4) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert start(*words, "-l", "stopped", "--max_steps", 3) == 0
    third = state_of("stopped")["state_dict"]
    assert start("-r", only_run("stopped"), "-t", "--max_steps", 4) == 0
    first, second = (state_of(name)["state_dict"] for name in ("whole", "stopped"))
    assert first.keys() == second.keys() and all(key.startswith("embedding_manager.") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)
    constant = ("frequencies", "norm", "settings.counts", "settings.options", "settings.dials")
    still = [key for key in first if "initial" not in key and torch.equal(first[key], third[key])]
    assert [key for key in still if not key.endswith(constant)] == [], "a step moves every parameter"
    folder = only_run("whole")
    assert list((folder / "images").glob("**/*.jpg"))
    assert triggers_of(folder / "checkpoints" / "embeddings.pt")[0] == "*"
    for path in (folder / "checkpoints").glob("*.safetensors"):
        metadata = read_words(path).metadata
        assert metadata.steps and metadata.images == 3 and metadata.images_fingerprint
    assert (folder / "learning_curve.png").is_file()
