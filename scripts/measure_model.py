"""Measure the embedded model: its first stage, how often it obeys prompts, and the judge of its images.

    python scripts/measure_model.py first-stage    # PSNR of validation images
    python scripts/measure_model.py judge          # accuracy on images that nothing was trained on
    python scripts/measure_model.py prompts        # share of prompts obeyed, and a contact sheet

Each prints a Markdown table and writes it with a JSON file into --outdir.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import JUDGE, MODEL, guarded
from ldm.console import Parser, argument, positive

SHEET_ROWS, SHEET_COLUMNS = 8, 12

Rows = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("first-stage", "judge", "prompts"))
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="folder of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--judge", type=Path, default=JUDGE, help="folder of the judge (default: %(default)s)"
    )
    parser.add_argument(
        "--count",
        type=positive,
        help="number of images (default: first-stage 1024, judge 4096, prompts 1200)",
    )
    parser.add_argument(
        "--steps", type=positive, default=25, help="DPM-Solver++ steps (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=argument("scale", float), default=3.0, help="guidance scale (default: %(default)s)"
    )
    parser.add_argument("--seed", type=argument("image_seed", int), default=0, help="default: %(default)s")
    parser.add_argument("--batch_size", type=positive, default=48, help="default: %(default)s")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/measures"), help="default: %(default)s")
    return guarded(lambda: measure(parser.parse_args(argv)))


def measure(options: argparse.Namespace) -> None:
    """Run one measurement, and write and print its results."""
    if options.what == "first-stage":
        rows, facts = first_stage(options)
    elif options.what == "judge":
        rows, facts = judge(options)
    else:
        rows, facts = prompts(options)
    from ldm.evaluation.report import table, versions
    from ldm.files import file_hash, write_text

    columns = {key: key for key in next(iter(rows.values()))}
    text = table(options.what, columns, rows.items())
    made_with = {"model": str(options.model), "judge": str(options.judge), "seed": options.seed} | versions()
    for name, folder in (("model", options.model), ("judge", options.judge)):
        weights = folder / "model.safetensors"
        made_with[f"{name}_sha256"] = file_hash(weights) if weights.is_file() else None
    stem = options.outdir / options.what
    write_text(stem.with_suffix(".md"), text)
    write_text(stem.with_suffix(".json"), json.dumps(facts | made_with, indent=1) + "\n")
    print(text, end="")
    print(f"wrote {stem}.md and {stem}.json")


def first_stage(options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Measure the PSNR in dB of images that are encoded and decoded: mean and standard deviation."""
    from ldm.data.creatures.dataset import Creatures
    from ldm.evaluation.evaluate import psnr, reconstruct
    from ldm.images import to_pil

    model, size = _model(options.model)
    data = Creatures(size, options.count or 1024, split="validation", captions=False)
    images = [to_pil(data.image(k).movedim(-1, 0)) for k in range(len(data))]
    mean, deviation = psnr(images, reconstruct(model, images))
    rows = {"PSNR": {"dB": round(mean, 2), "spread": round(deviation, 2), "of": len(images)}}
    return rows, {"psnr_db": mean, "spread_db": deviation, "pictures": len(images)}


def judge(options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Measure the judge's accuracy on images of the split that only evaluations use."""
    import torch

    from ldm.data.creatures.dataset import Creatures
    from ldm.data.creatures.world import ATTRIBUTES
    from ldm.evaluation.judge import AttributeJudge, visible_attributes
    from scripts.obedience import TITLES

    classifier = AttributeJudge.load(options.judge)
    data = Creatures(classifier.size, options.count or 4096, split="evaluation", captions=False)
    pixels = torch.from_numpy(data.images).movedim(-1, 1).float() / 127.5 - 1
    labels = torch.from_numpy(data.labels).long()
    photo = labels[:, list(ATTRIBUTES).index("style")] == ATTRIBUTES["style"].index("photo")
    chunks = [classifier.predict_indices(chunk) for chunk in pixels.split(256)]
    counts = {}
    for column, name in enumerate(ATTRIBUTES):
        correct = torch.cat([chunk[name] for chunk in chunks]) == labels[:, column]
        counts[TITLES[name]] = _share(correct[visible_attributes(name, labels)])
        if name != "style":
            counts[f"{TITLES[name]}, in photos"] = _share(correct[visible_attributes(name, labels) & photo])
    return _shares(counts), {"right": counts}


def prompts(options: argparse.Namespace) -> tuple[Rows, dict[str, Any]]:
    """Measure the share of prompts obeyed, as the judge classifies the generated images."""
    import torch
    from tqdm import tqdm

    from ldm.evaluation.judge import AttributeJudge
    from ldm.files import atomic_write
    from ldm.generate import generate
    from ldm.images import image_grid, labelled, to_tensor
    from scripts.obedience import TITLES, count_obeyed, draw_prompts

    classifier, (model, _) = AttributeJudge.load(options.judge), _model(options.model)
    cases = draw_prompts(options.count or 1200, options.seed)
    started = time.monotonic()
    with tqdm(total=len(cases), desc="pictures", unit="") as bar:
        images = generate(
            model,
            [case.prompt for case in cases],
            steps=options.steps,
            scale=options.scale,
            sampler="dpm_solver",
            seed=options.seed,
            batch_size=options.batch_size,
            on_image=lambda *_: bar.update(),
        )
    seconds = time.monotonic() - started
    predictions = classifier.predict(torch.stack([to_tensor(image) for image in images]))
    counts = {TITLES[name]: count for name, count in count_obeyed(cases, images, predictions).items()}
    shown = images[: SHEET_ROWS * SHEET_COLUMNS]
    captions = "\n".join(
        f"{row + 1}: " + " | ".join(case.prompt for case in cases[row * SHEET_COLUMNS :][:SHEET_COLUMNS])
        for row in range(SHEET_ROWS)
    )
    sheet = labelled(image_grid(shown, SHEET_COLUMNS, scale=3), "prompts.txt has the prompts, row by row")
    atomic_write(options.outdir / "prompts.png", lambda file: sheet.save(file, format="PNG"))
    atomic_write(options.outdir / "prompts.txt", lambda file: file.write(captions.encode()))
    facts = {"obeyed": counts, "steps": options.steps, "scale": options.scale, "seconds": round(seconds, 1)}
    return _shares(counts), facts


def _model(folder: Path) -> tuple[Any, int]:
    from ldm.commands.base import check_files
    from ldm.commands.evaluate import load_model

    weights = str(folder / "model.safetensors")
    check_files(weights)
    return load_model(weights, None)


def _share(correct: Any) -> tuple[int, int]:
    return int(correct.sum()), len(correct)


def _shares(counts: dict[str, tuple[int, int]]) -> Rows:
    from scripts.obedience import confidence_interval

    return {
        name: {
            "share": right / of,
            "95 % interval": "{:.3f} to {:.3f}".format(*confidence_interval(right, of)),
            "of": of,
        }
        for name, (right, of) in counts.items()
        if of
    }


if __name__ == "__main__":
    sys.exit(main())
