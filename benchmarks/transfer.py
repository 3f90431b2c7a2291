"""How well a linear map carries tokens from one text encoder to another, on tokens that were held out.

    python -m benchmarks.transfer

The source is the token table of the embedded model. The targets are random rotations of it with noise, as a check of
what can be recovered, and the table of a second text encoder, of another width and from other random weights, which is
trained here to tell what captions of the embedded world describe. No images are generated.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import ROOT
from benchmarks.report import Report
from ldm.commands.base import MODEL, guarded
from ldm.console import Parser, positive
from ldm.data.creatures.captions import Description, caption, vocabulary
from ldm.data.creatures.dataset import label
from ldm.data.creatures.world import ATTRIBUTES, NAMES, creature, individual, individual_of, scene
from ldm.embeddings.inspection import token_tables
from ldm.embeddings.transfer import fit_transfer

NOISES = (0.0, 0.25, 0.5, 1.0, 2.0)
_BATCH = 256
_NAMED = 0.4  # of the captions are about an individual, as in the training of the embedded model's encoder


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--width", type=positive, default=96, help="of the second encoder (default: %(default)s)"
    )
    parser.add_argument("--captions", type=positive, default=100_000, help="it sees (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the second encoder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    return guarded(lambda: measure(parser.parse_args(argv)))


def measure(options: argparse.Namespace) -> None:
    """Fit the map to each target and write the table of results."""
    source = next(iter(token_tables(ROOT / MODEL / "model.safetensors").values()))
    folder = ROOT / MODEL / "text_encoder"
    rows = word_rows(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    started = time.perf_counter()
    second = train_encoder(folder, options.width, options.captions, options.seed)
    seconds = time.perf_counter() - started
    targets = {f"rotation, noise {noise:g}": rotated(source, 2 * source.shape[1], noise) for noise in NOISES}
    targets["second text encoder"] = second
    report = Report(
        "transfer",
        "Tokens carried to another text encoder: cosine similarity to the true vectors of held-out tokens",
        ("target", "width", "this map", "nearest token", "mean", "ridge penalty"),
        {"captions": options.captions, "seed": options.seed},
        notes=[
            f"Source: the embedded model, {source.shape[1]} wide; {len(rows)} tokens that are whole words, of which "
            "a tenth chooses the penalty and a tenth is measured on.",
            "Noise is relative to the deviation of the rotated table; at 1, half of a vector's variance is noise.",
            f"The second text encoder was trained in {seconds:.0f} seconds. No images were generated with the result.",
        ],
    )
    for name, target in targets.items():
        fit = fit_transfer(source[rows], target[rows])
        figures = (fit.agreement, fit.nearest, fit.mean)
        report.rows.append(
            (name, str(target.shape[1]), *(f"{figure:.3f}" for figure in figures), f"{fit.penalty:g}")
        )
        report.data[name] = {"map": fit.agreement, "nearest": fit.nearest, "mean": fit.mean}
    report.write(options.out)
    print(report.markdown())


def word_rows(ids: dict[str, int]) -> list[int]:
    """Return the token ids of the words that captions use."""
    return sorted(ids[f"{word}</w>"] for word in set(vocabulary()) if f"{word}</w>" in ids)


def rotated(table: Tensor, width: int, noise: float) -> Tensor:
    """Return a token table [V, width]: a random rotation of `table` with noise relative to its deviation."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, table.shape[1], generator=generator))[0].T
    target = table @ rotation
    return target + noise * target.std() * torch.randn(target.shape, generator=generator)


def train_encoder(folder: Path, width: int, captions: int, seed: int) -> Tensor:
    """Train a text encoder with a folder's vocabulary to tell the attributes in captions; return its token table."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = CLIPTextConfig.from_pretrained(
        folder, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2
    )
    encoder = CLIPTextModel(config)
    heads = nn.Linear(width, sum(map(len, ATTRIBUTES.values())))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.05)
    steps = max(1, captions // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        texts, labels = described(range(step * _BATCH, (step + 1) * _BATCH), seed)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        logits = heads(encoder(**tokens).pooler_output)
        parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
        losses = [nn.functional.cross_entropy(part, labels[:, k]) for k, part in enumerate(parts)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return encoder.get_input_embeddings().weight.detach()


def described(numbers: Sequence[int], seed: int) -> tuple[list[str], Tensor]:
    """Return captions of creatures, and the index of each attribute's value: int64 [N, attributes]."""
    texts, labels = [], []
    for number in numbers:
        rng = random.Random(f"transfer {seed} {number}")
        own = individual_of(number, _NAMED)
        shown = creature(number) if own is None else individual(own)
        description = Description.of(shown, scene(number, shown.color), None if own is None else NAMES[own])
        texts.append(caption(description, rng))
        labels.append(label(description))
    return texts, torch.tensor(labels)


if __name__ == "__main__":
    sys.exit(main())
