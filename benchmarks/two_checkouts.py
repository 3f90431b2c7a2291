"""The time of a training step with one plain vector, in another checkout and in this one.

    python -m benchmarks.two_checkouts --before ../main     # processes in turns, so that other load slows down both
    python -m benchmarks.two_checkouts --before ../main --subject sd-v1 --steps 8 --rounds 5

A step is the encoding of captions, the denoiser forward and backward, and the optimizer; nothing else of a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import runs
from benchmarks.machine import ROOT, commit_of
from benchmarks.report import Report
from benchmarks.rounds import Quartiles, ratio
from ldm.commands.base import guarded
from ldm.console import Parser, positive
from ldm.util import UserError

# Run in either checkout, so it uses only what both have.
MODELS = {
    "embedded": """
from ldm.checkpoint import load_model_from_config
folder, batch = "models/ldm/creatures/", 8
model = load_model_from_config(folder + "config.yaml", folder + "model.safetensors")
""",
    # Stable Diffusion v1's size with random weights, at 256x256.
    "sd-v1": """
import pathlib, tempfile
from omegaconf import OmegaConf
from benchmarks.subjects import random_model, stand_in_encoder
batch = 1
with tempfile.TemporaryDirectory() as folder:
    config = OmegaConf.load("configs/stable-diffusion/v1-finetune.yaml")
    encoder = str(stand_in_encoder(pathlib.Path(folder)))
    OmegaConf.update(config, "model.params.cond_stage_config.params.version", encoder, force_add=True)
    config.model.params.image_size = 32
    model = random_model(config)
""",
}
STEPS = """
model = model.train()
optimizer = torch.optim.AdamW(model.embedding_manager.embedding_parameters(), 1e-3)
torch.manual_seed(0)
latents = torch.randn(batch, model.channels, model.image_size, model.image_size)
captions = (["a photo of *", "a dark photo of the *", "a * on a beach", "the photo of a *"] * 2)[:batch]
times = []
for step in range(int(sys.argv[1])):
    start = time.perf_counter()
    loss, _ = model(latents, captions)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
kept = sorted(times[len(times) // 9 :])
print(kept[len(kept) // 2])
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--subject", choices=list(MODELS), default="embedded", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=7, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=45, help="in each process (default: %(default)s)")
    runs.add_options(parser)
    return guarded(lambda: compare(parser.parse_args(argv)))


def compare(options: argparse.Namespace) -> None:
    """Take turns, and write the median step of both and the median of the quotients within each round."""
    if not (options.before / "ldm").is_dir():
        raise UserError(f"--before '{options.before}' is no checkout; name a folder with ldm/ in it")
    runs.set_up(options)
    before: list[float] = []
    after: list[float] = []
    for number in range(options.rounds):
        sides = [(options.before.resolve(), before), (ROOT, after)]
        order = sides if number % 2 else sides[::-1]  # whoever is first may be favoured
        for folder, times in order:
            times.append(median_step(folder, options.subject, options.steps, torch.get_num_threads()))
    quotient = ratio(after, before)
    report = Report(
        f"two_checkouts_{options.subject}",
        f"A step of {options.subject} with one plain vector, in two checkouts",
        ("checkout", "median step, ms", "times the other"),
        {"rounds": options.rounds, "steps": options.steps, "before": commit_of(options.before)},
        [
            ("before", f"{1000 * Quartiles.of(before).median:.1f}", ""),
            ("this one", f"{1000 * Quartiles.of(after).median:.1f}", quotient.text()),
        ],
        data={"before": before, "after": after},
    )
    print(report.write(options.out))


def median_step(folder: Path, subject: str, steps: int, threads: int) -> float:
    """The median seconds of a step in a process of its own."""
    code = f"import sys, time, torch\ntorch.set_num_threads(int(sys.argv[2]))\n{MODELS[subject]}\n{STEPS}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(steps), str(threads)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"'{folder}': {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
