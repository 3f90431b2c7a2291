from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import main
from ldm import embeddings
from ldm.training.callbacks.guard import VectorStats
from ldm.util import UserError

OFTEN = ["lightning.callbacks.vector_stats.params.every_n_train_steps=2"]


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def rows_of(folder: str) -> list[list[float]]:
    (run,) = Path(folder).iterdir()
    callbacks = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next(value for key, value in callbacks.items() if "Health" in key)["rows"]


def test_norm_and_direction_of_the_vectors(tiny_yaml, tiny_model, capsys):
    words = [*OFTEN, "lightning.modelcheckpoint.params.every_n_train_steps=2"]
    start_file = "start.pt"
    table = load_file(tiny_model)["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    first = table[7][None]
    concept = embeddings.Concept("*", first, encoder=embeddings.encoder_kind("clip", 32))
    embeddings.write(embeddings.LearnedEmbeddings((concept,)), Path(start_file), "original")
    assert start("--base", tiny_yaml, "-t", "-l", "a", *words, "--embedding_manager_ckpt", start_file) == 0
    (run,) = Path("a").iterdir()
    found = rows_of("a")
    assert [row[0] for row in found] == [2, 4, 6]
    for step, ratio, cosine, rate in found:
        file = run / "checkpoints" / f"embeddings_gs-{int(step)}.pt"
        vectors = embeddings.read(file).concepts[0].vectors
        assert ratio == pytest.approx(float(vectors.norm() / table.norm(dim=1).mean()), rel=1e-5)
        assert cosine == pytest.approx(float(torch.cosine_similarity(vectors, first)), rel=1e-5)
        assert rate == pytest.approx(1e-2)
    assert found[-1][2] < 0.9999, "it has turned"
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 6/6")]
    assert f"norm x{found[-1][1]:.2f}, cos {found[-1][2]:.2f}" in last[0]
    (csv,) = run.glob("csv/*/metrics.csv")
    assert "vectors/norm_ratio" in csv.read_text().splitlines()[0]


def test_the_beginning_is_the_runs_and_not_the_processs(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "-l", "straight", *OFTEN) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "stopped", *OFTEN, "--max_steps", 3) == 0
    (run,) = Path("stopped").iterdir()
    assert start("-r", run, "-t", "--max_steps", 6) == 0
    assert rows_of("stopped") == rows_of("straight")


def test_bad_settings():
    with pytest.raises(UserError, match="every_n_train_steps is 0"):
        VectorStats(every_n_train_steps=0)
