"""The timed models, and the command lines of their runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextConfig

from benchmarks.machine import ROOT
from ldm.training import run
from ldm.util import instantiate_from_config, skip_pretrained

CONCEPT = ROOT / "data" / "concepts" / "bobo"
TOKENIZER = ROOT / "models" / "ldm" / "creatures" / "text_encoder"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class TimedModel:
    """A YAML in configs, overrides for it, and a function that makes the model from the merged configuration."""

    title: str
    base: str
    overrides: tuple[str, ...]
    make: Callable[[DictConfig], pl.LightningModule]

    def argv(self, workdir: Path, *further: str, recipe: str | None = "fast") -> list[str]:
        """Return the arguments of main.py for a run on the sample concept, in a folder under `workdir`."""
        words = ["--base", str(ROOT / "configs" / self.base)]
        words += [str(ROOT / "configs" / "recipes" / f"{recipe}.yaml")] if recipe else []
        words += ["-t", "-l", str(workdir), "--data_root", str(CONCEPT), "--init_word", "bear"]
        return [*words, *(text.format(workdir=workdir) for text in self.overrides), *further]


def random_model(config: DictConfig) -> pl.LightningModule:
    """Make a model with random weights; layers initialized to zero too, or no gradient would reach the vectors."""
    with skip_pretrained(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = instantiate_from_config(config["model"])
        fill_zeros(model)
    model.embedding_manager.reset(model.cond_stage_model)
    return model


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Initialize layers whose weights are zero with random weights of the usual scale."""
    for part in model.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear) and not weight.any():
            weight.normal_(std=weight[0].numel() ** -0.5)


def stand_in_encoder(folder: Path) -> Path:
    """Write CLIP ViT-L/14's text configuration with the embedded model's tokenizer, to avoid a download."""
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    ).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


EMBEDDED = TimedModel("embedded model", "latent-diffusion/txt2img-finetune.yaml", (), run.make_model)


def stable_diffusion(size: int, workdir: Path) -> TimedModel:
    """Stable Diffusion v1 at `size` pixels and batch 1, with random weights."""
    encoder = stand_in_encoder(workdir / "text_encoder")
    return TimedModel(
        f"SD v1, random weights, {size} x {size}, batch 1",
        "stable-diffusion/v1-finetune.yaml",
        (
            "data.params.batch_size=1",
            f"data.params.train.params.size={size}",
            f"model.params.cond_stage_config.params.version={encoder}",
        ),
        random_model,
    )
