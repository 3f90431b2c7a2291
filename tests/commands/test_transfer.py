"""The command `transfer` of scripts/embeddings.py."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.embeddings import read, write
from tests.commands.embeddings_calls import fails, run
from tests.embeddings.samples import GOLDEN, learned, vectors


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Checkpoints whose token tables are noisy rotations of one another, and one with BERT."""
    source = vectors(600, 32, seed=5)
    rotation = torch.linalg.qr(vectors(48, 32, seed=6))[0].T
    target = 2 * source @ rotation + 0.1 * vectors(600, 48, seed=7)
    tables = {
        "a.safetensors": (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            source,
        ),
        "b.safetensors": ("cond_stage_model.model.token_embedding.weight", target),
        "bert.safetensors": ("cond_stage_model.transformer.token_emb.weight", vectors(600, 64)),
        "none.safetensors": ("model.diffusion_model.out.2.weight", vectors(4, 4)),
    }
    for name, (key, table) in tables.items():
        save_file({key: table}, tmp_path / name)
    return {name.split(".")[0]: tmp_path / name for name in tables}


@pytest.mark.parametrize("name", ["cat-b.safetensors", "cat-b.pt"])
def test_transfer(name, models, tmp_path, capsys):
    learned_word = write(learned("<cat>", count=2, width=32), tmp_path / "cat.safetensors")
    out = tmp_path / name
    command = ["transfer", learned_word, "--from", models["a"], "--to", models["b"], "--out", out]
    run(list(map(str, command)))
    output = capsys.readouterr().out
    [figures] = [line for line in output.splitlines() if "this map" in line]
    ours, nearest, mean = (float(part.split()[-1]) for part in figures.split(","))
    assert ours > 0.9 and ours > nearest + 0.3 and nearest > mean
    assert "60 tokens that were held out" in output and "measured on tokens, not on images" in output
    found = read(out)
    assert found.concepts[0].vectors.shape == (2, 48)
    assert found.metadata.transferred_from == "a.safetensors" and found.metadata.base_model == "b.safetensors"
    assert found.metadata.initializer == "cat" and found.metadata.steps is None
    run(["inspect", str(out)])
    assert "transferred from a.safetensors" in capsys.readouterr().out
    assert "exists already" in fails(capsys, 1, *command)


def test_a_transferred_word_is_a_start_for_training(models, tmp_path, capsys):
    """The back direction gives the width of the small text encoder, whose manager loads it."""
    from ldm.modules.embedding_manager import EmbeddingManager
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder
    from ldm.util import skip_pretrained

    word = write(learned("<cat>", count=2, width=48), tmp_path / "cat.safetensors")
    out = tmp_path / "cat-a.safetensors"
    run(["transfer", str(word), "--from", str(models["b"]), "--to", str(models["a"]), "--out", str(out)])
    with skip_pretrained():
        embedder = FrozenCLIPEmbedder(version=str(GOLDEN / "clip_tiny"))
    manager = EmbeddingManager(embedder, ["<cat>"], num_vectors_per_token=2, embedding_manager_ckpt=out)
    assert torch.equal(manager.vectors("<cat>").detach(), read(out).concepts[0].vectors)


@pytest.mark.refused_first
def test_impossible_transfers_end_in_one_line(models, tmp_path, capsys):
    word = write(learned("<cat>", width=32), tmp_path / "cat.safetensors")

    def refused(source: object, target: object) -> str:
        return fails(
            capsys, 1, "transfer", word, "--from", source, "--to", target, "--out", tmp_path / "o.pt"
        )

    for line, words in (
        (refused(models["a"], models["bert"]), "BERT's vocabulary differs from CLIP's"),
        (refused(models["none"], models["b"]), "has no text encoder; name a checkpoint"),
        (
            refused(models["b"], models["a"]),
            "width 48: name the model that the word was trained on with --from",
        ),
        (refused(tmp_path / "absent", models["b"]), "absent' does not exist; check the path"),
        (refused(models["a"], word), "has no text encoder"),
    ):
        assert words in line and line.count("\n") == 1 and len(line) < 308
    assert not (tmp_path / "o.pt").exists()


class Hub:
    """In place of the hub: a repository of a model in the layout of diffusers, whose downloads write tables."""

    def __init__(self, root: Path, tables: dict[str, torch.Tensor]) -> None:
        self.root, self.tables, self.online = root, tables, True
        self.fetched: list[str] = []

    def snapshot_download(self, repository, revision=None, local_files_only=False, allow_patterns=()):
        folder = self.root / repository.replace("/", "--")
        if local_files_only and not folder.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        for name in allow_patterns:
            self.fetched.append(f"{repository}/{name}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                key = "text_model.embeddings.token_embedding.weight"
                save_file({key: self.tables[repository]}, folder / name)
            elif name == "model_index.json":
                parts = ("unet", "text_encoder", "tokenizer")
                (folder / name).write_text(json.dumps({part: ["x", "y"] for part in parts}))
            else:
                words = {f"w{i}</w>": i for i in range(600)}
                (folder / name).write_text(json.dumps(words))
        return str(folder)

    def model_info(self, repository, revision=None):
        if not self.online or repository not in self.tables:
            raise ConnectionError("Name or service not known")
        names = ["model_index.json", "tokenizer/vocab.json", "unet/diffusion_pytorch_model.safetensors"]
        names += ["text_encoder/config.json", "text_encoder/model.safetensors", "v1-5.ckpt"]
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> Hub:
    tables = {
        f"someone/{name}": next(iter(load_file(models[name]).values())).contiguous() for name in ("a", "b")
    }
    made = Hub(tmp_path / "hub", tables)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_transfer_between_models_of_the_hub_fetches_their_text_encoders(models, hub, tmp_path, capsys):
    word = write(learned("<cat>", count=2, width=32), tmp_path / "cat.safetensors")
    for name, source, target in (
        ("here", models["a"], models["b"]),
        ("hub", "someone/a", "someone/b"),
        ("both", models["a"], "someone/b"),
    ):
        command = [
            "transfer",
            word,
            "--from",
            source,
            "--to",
            target,
            "--out",
            tmp_path / f"{name}.safetensors",
        ]
        run(list(map(str, command)))
    here, *others = (read(tmp_path / f"{name}.safetensors") for name in ("here", "hub", "both"))
    for other in others:
        assert torch.equal(other.concepts[0].vectors, here.concepts[0].vectors)
        assert other.metadata.base_model == "b"
    assert hub.fetched.count("someone/b/text_encoder/model.safetensors") == 1
    assert not any("unet" in name or "ckpt" in name for name in hub.fetched)
    hub.online = False  # what was fetched is enough
    run(["inspect", str(tmp_path / "hub.safetensors"), "--ckpt_path", "someone/b", "--words", "1"])
    assert "nearest 1   w" in capsys.readouterr().out


@pytest.mark.refused_first
def test_a_model_that_the_hub_does_not_give_ends_in_one_line(models, hub, tmp_path, capsys):
    word = write(learned("<cat>", width=32), tmp_path / "cat.safetensors")
    out = tmp_path / "out.safetensors"
    for source, said in (
        (
            "someone/else",
            "'someone/else': it is no file or folder here nor readable from the Hugging Face hub",
        ),
        ("https://x.org/a.safetensors", "'https://x.org/a.safetensors' is a web address; name a hub id"),
    ):
        line = fails(capsys, 1, "transfer", word, "--from", source, "--to", models["b"], "--out", out)
        assert said in line and line.count("\n") == 1 and len(line) < 308
    assert "does not exist" in fails(capsys, 1, "inspect", word, "--ckpt_path", "absent.ckpt")
    assert not out.exists()
