"""A run with a personalization of the user's own: training, files, resuming, and the callbacks of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm import pickles
from tests.training.own_personalization import Offset
from tests.training.runs import only_run, start, state_of

OFTEN = [
    f"lightning.callbacks.{name}.params.every_n_train_steps=1"
    for name in ("training_guard", "vector_stats", "deterministic_loss")
]


def test_training_and_resuming(tiny_yaml, capsys) -> None:
    target = f"{Offset.__module__}.{Offset.__qualname__}"
    own = {"model": {"params": {"personalization_config": {"target": target, "params": {"word": "*"}}}}}
    OmegaConf.save(OmegaConf.create(own), "own.yaml")
    words = ["--base", tiny_yaml, "own.yaml", "-t", *OFTEN]
    images = "lightning.callbacks.image_logger.params"
    words += [f"{images}.batch_frequency=3", f"{images}.log_images_kwargs.ddim_steps=1"]
    assert start(*words, "-l", "uninterrupted") == 0
    shown = capsys.readouterr()
    assert "learning '*' (1 vector) from 3 images" in shown.out
    assert "Traceback" not in shown.err

    folder = only_run("uninterrupted") / "checkpoints"
    state, callbacks = (state_of("uninterrupted")[key] for key in ("state_dict", "callbacks"))
    (statistics,) = (value for key, value in callbacks.items() if "Health" in key)
    assert statistics["rows"] == [], "there are no exported vectors to measure"
    assert list(state) == ["embedding_manager.offset"]
    offset = pickles.load(folder / "embeddings.pt")["offset"]
    assert torch.equal(offset, state["embedding_manager.offset"]) and offset.norm() > 0
    assert (folder / "embeddings_best.pt").is_file()
    assert not list(folder.glob("*.safetensors")), "it exports no vectors"
    assert (Path(only_run("uninterrupted")) / "learning_curve.png").is_file()

    assert start(*words, "-l", "stopped", "--max_steps", 3) == 0
    assert start("-r", only_run("stopped"), "-t", "--max_steps", 6) == 0
    assert torch.equal(state_of("stopped")["state_dict"]["embedding_manager.offset"], offset)
    last = folder / "embeddings.pt"
    assert start(*words, "-l", "file", "--embedding_manager_ckpt", last, "--max_steps", 1) == 1
    assert "unknown key 'embedding_manager_ckpt'" in capsys.readouterr().err
