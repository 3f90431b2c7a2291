"""Sample vectors, files as other tools write them, and helpers for the tests of embedding files."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import Concept, EmbeddingError, LearnedEmbeddings, Metadata, Progress, read

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WIDTH = 768


def vectors(count: int = 2, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def learned(trigger: str = "<cat>", count: int = 2, width: int = WIDTH, seed: int = 0) -> LearnedEmbeddings:
    metadata = Metadata(
        base_model="sd-v1-5",
        base_model_hash="cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
        steps=500,
        seed=23,
        initializer="cat",
        learning_rate=5e-3,
        images=5,
        images_fingerprint="0123456789abcdef",
        tool="ldm 1.0",
        date="2026-01-02T03:04:05+00:00",
    )
    encoder = "bert" if width == 1280 else None
    return LearnedEmbeddings((Concept(trigger, vectors(count, width, seed), encoder),), metadata)


def progressive(
    trigger: str = "<cat>", step: int = 150, scale: int = 100, count: int = 4, seed: int = 0
) -> LearnedEmbeddings:
    """Embeddings of a progressive run after `step` steps; with the defaults, 2 of 4 vectors are in use."""
    progress, rows = Progress(step, scale), vectors(count, seed=seed)
    used = progress.in_use(count)
    concept = Concept(trigger, rows[:used], unused=rows[used:] if used < count else None)
    return LearnedEmbeddings((concept,), progress=progress)


def clip_folder(folder: Path) -> Path:
    """Copy the small text encoder to a folder, with a full vocabulary, because diffusers appends tokens after it."""
    for file in (GOLDEN / "clip_tiny").iterdir():
        shutil.copy(file, folder)
    ids = json.loads((folder / "vocab.json").read_text())
    known = set(ids.values())
    ids.update({f"unused{number}</w>": number for number in range(49408) if number not in known})
    (folder / "vocab.json").write_text(json.dumps(ids))
    return folder


def torch_saved(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def tensors_saved(tensors: dict, metadata: dict | None = None) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path, metadata)


def a1111_dict(name: str = "cat", value: torch.Tensor | None = None) -> dict:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": (vectors() if value is None else value).requires_grad_()},
        "name": name,
        "step": 499,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": "v1-5-pruned",
    }


# Files of other tools: file name, writer, and the format, trigger and encoder that reading must give.
FOREIGN = {
    "a1111 zip": ("cat.pt", torch_saved(a1111_dict()), "a1111", "cat", "clip_l"),
    "a1111 legacy": (
        "cat.pt",
        lambda path: torch.save(a1111_dict(), path, _use_new_zipfile_serialization=False),
        "a1111",
        "cat",
        "clip_l",
    ),
    "a1111 renamed": ("dog.pt", torch_saved(a1111_dict()), "a1111", "dog", "clip_l"),
    "a1111 with step": ("cat-500.pt", torch_saved(a1111_dict()), "a1111", "cat", "clip_l"),
    "a1111 safetensors": (
        "cat.safetensors",
        tensors_saved({"emb_params": vectors()}),
        "emb_params",
        "cat",
        "clip_l",
    ),
    "hcp": (
        "cat.pt",
        torch_saved({"string_to_param": {"*": vectors()}, "name": "cat"}),
        "hcp",
        "cat",
        "clip_l",
    ),
    "ai-toolkit pt": ("cat.pt", torch_saved({**a1111_dict(), "notes": ""}), "ai-toolkit", "cat", "clip_l"),
    "ai-toolkit": (
        "x.safetensors",
        tensors_saved(
            {"emb_params": vectors()},
            {
                "name": '"cat"',
                "step": "500",
                "string_to_token": '{"*": 265}',
                "string_to_param": '{"*": "emb_params"}',
                "software": '{"name": "ai-toolkit"}',
            },
        ),
        "ai-toolkit",
        "cat",
        "clip_l",
    ),
    "diffusers bin": (
        "learned_embeds.bin",
        torch_saved({"<cat>": vectors()}),
        "diffusers",
        "<cat>",
        "clip_l",
    ),
    "diffusers": (
        "learned_embeds.safetensors",
        tensors_saved({"<cat>": vectors()}, {"format": "pt"}),
        "diffusers",
        "<cat>",
        "clip_l",
    ),
    "diffusers half": (
        "learned_embeds.safetensors",
        tensors_saved({"<cat>": vectors().half().float().half()}, {"format": "pt"}),
        "diffusers",
        "<cat>",
        "clip_l",
    ),
    "bare tensor": ("cat.bin", torch_saved(vectors()), "tensor", "cat", "clip_l"),
    "kohya": (
        "cat.safetensors",
        tensors_saved(
            {"emb_params": vectors()},
            {
                "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
                "modelspec.trigger_phrase": "<cat>",
                "ss_steps": "500",
                "ss_seed": "23",
                "ss_learning_rate": "5e-06",
                "ss_sd_model_name": "v1-5.safetensors",
                "ss_sd_model_hash": "12345678",
            },
        ),
        "kohya",
        "<cat>",
        "clip_l",
    ),
    "kohya pt": ("cat.pt", torch_saved({"emb_params": vectors()}), "emb_params", "cat", "clip_l"),
    "kohya sd2": (
        "cat.safetensors",
        tensors_saved({"emb_params": vectors(width=1024)}, {"ss_seed": "1"}),
        "kohya",
        "cat",
        "clip_h",
    ),
    "onetrainer": (
        "cat.safetensors",
        tensors_saved({"emp_params": vectors()}),
        "onetrainer",
        "cat",
        "clip_l",
    ),
    "replicate": ("cat.pti", tensors_saved({"text_encoders_0": vectors()}), "replicate", "cat", "clip_l"),
}


def as_bytes(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(EmbeddingError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.isprintable() and len(message) < 300


def rebuilt(data: bytes, edit: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = edit.get(name.split("/", 1)[1], old.read(name))
            new.writestr(name, content)
    return out.getvalue()
