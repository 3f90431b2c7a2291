"""A run with a personalization of the user's own: training, files, resuming, and the callbacks of a run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm import pickles
from ldm.commands import generate
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
    words = ["--base", tiny_yaml, "own.yaml", "-t", "--seed", 1, *OFTEN]
    images = "lightning.callbacks.image_logger.params"
    words += [f"{images}.batch_frequency=3", f"{images}.log_images_kwargs.ddim_steps=1"]
    assert start(*words, "-l", "uninterrupted") == 0
    shown = capsys.readouterr()
    assert "learning '*' (1 vector) from 3 images" in shown.out
    assert "Traceback" not in shown.err

    folder = only_run("uninterrupted") / "checkpoints"
    state, callbacks = (state_of("uninterrupted")[key] for key in ("state_dict", "callbacks"))
    (statistics,) = (value for key, value in callbacks.items() if "Health" in key)
    assert [row[0] for row in statistics["rows"]] == [1, 2, 3, 4, 5, 6]
    assert all(math.isnan(row[1]) and row[3] > 0 for row in statistics["rows"]), "the learning rate alone"
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


def test_generating_with_the_file_of_a_run(tiny_yaml, tiny_model) -> None:
    own = [
        "model.params.personalization_config.target=tests.training.own_personalization.Offset",
        "model.params.personalization_config.params={word: '*'}",
    ]
    assert start("--base", tiny_yaml, "-t", *own) == 0
    config = next((only_run() / "configs").glob("*project.yaml"))
    learned = ["--embedding_path", only_run() / "checkpoints" / "embeddings.pt"]
    images = []
    for name, file in (("learned", learned), ("fresh", [])):
        words = [
            "--ckpt_path",
            tiny_model,
            "--config",
            config,
            "--prompt",
            "a photo of *",
            "--outdir",
            name,
            *file,
        ]
        words += ["--ddim_steps", 2, "--n_samples", 1, "--skip_grid"]
        assert generate.main([str(word) for word in words]) == 0
        images.append((Path(name) / "samples" / "0000.png").read_bytes())
    assert images[0] != images[1]
