"""A personalization of a stranger trains, saves, resumes and generates: the contract says all that is needed."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.commands import generate
from tests.training.runs import only_run, start

TARGET = "model.params.personalization_config.target=tests.training.own_personalization.Offset"


def offset_of(run: Path) -> torch.Tensor:
    return torch.load(run / "checkpoints" / "embeddings.pt", weights_only=True)["offset"]


def test_train_save_resume_and_generate(tiny_yaml, tiny_model, capsys):
    swap = [TARGET, "model.params.personalization_config.params={word: '*'}"]
    assert start("--base", tiny_yaml, "-t", "-l", "straight", *swap) == 0
    straight = only_run("straight")
    assert offset_of(straight).abs().sum() > 0

    assert start("--base", tiny_yaml, "-t", "-l", "stopped", "--max_steps", 3, *swap) == 0
    stopped = only_run("stopped")
    assert not torch.equal(offset_of(stopped), offset_of(straight))
    assert start("-r", stopped, "-t", "--max_steps", 6) == 0
    assert torch.equal(offset_of(stopped), offset_of(straight))

    config = sorted((straight / "configs").glob("*project.yaml"))[-1]
    images = []
    for name, file in (
        ("learned", ["--embedding_path", straight / "checkpoints" / "embeddings.pt"]),
        ("fresh", []),
    ):
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
