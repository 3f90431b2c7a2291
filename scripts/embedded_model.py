"""Train the embedded model, from rendered images to a checkpoint.

    python scripts/embedded_model.py train       # first stage, decoder again, text encoder, denoiser, judge
    python scripts/embedded_model.py assemble    # write the weights to models/ldm/creatures, in half precision

Each stage is a run of main.py with a YAML of configs/creatures. Finished stages are skipped, and interrupted ones are
resumed. `--stage` runs one stage only; `--from-scratch` deletes earlier results.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    import checkout  # noqa: F401

from ldm.commands.base import JUDGE, MODEL, guarded
from ldm.console import Parser
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("first-stage", "decoder", "clip", "ldm", "judge")
BUILD = Path("build/creatures")
FINETUNE = "configs/latent-diffusion/txt2img-finetune.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the stages that are not finished")
    train.add_argument("--stage", choices=STAGES, action="append", help="only this stage (may be repeated)")
    train.add_argument("--from-scratch", action="store_true", help="delete the results of earlier calls")
    assemble = commands.add_parser("assemble", help="write the trained model in half precision")
    assemble.add_argument(
        "--out", type=Path, default=MODEL, help="folder of the model (default: %(default)s)"
    )
    assemble.add_argument(
        "--judge_out", type=Path, default=JUDGE, help="folder of the judge (default: %(default)s)"
    )
    return guarded(lambda: run(parser, argv))


def run(parser: Parser, argv: Sequence[str] | None) -> None:
    """Run a command; unknown arguments of `train` are passed on to main.py."""
    options, overrides = parser.parse_known_args(argv)
    if options.command == "train":
        train_stages(options.stage or STAGES, options.from_scratch, overrides)
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    else:
        assemble_model(options.out, options.judge_out)


def train_stages(stages: Sequence[str], from_scratch: bool, overrides: Sequence[str]) -> None:
    """Run main.py for each stage in turn, with `overrides` as further arguments."""
    for stage in stages:
        runs = BUILD / "runs" / stage
        if from_scratch:
            shutil.rmtree(runs, ignore_errors=True)
        if _finished(runs):
            print(f"{stage}: finished, in {_finished(runs)}")
            continue
        interrupted = sorted(runs.glob("*/checkpoints/last.ckpt"))
        command = [sys.executable, str(ROOT / "main.py"), "-t", "--scale_lr", "false"]
        if interrupted:
            command += ["-r", str(interrupted[-1].parents[1])]
        else:
            command += ["-l", str(runs), "-b", f"configs/creatures/{stage}.yaml"]
        print(f"{stage}: {' '.join(command[1:])}", flush=True)
        if subprocess.run([*command, *overrides]).returncode:
            raise UserError(f"stage '{stage}' failed; correct the error above and run the same command again")
        run = max(runs.iterdir())
        (run / "finished").touch()
        _export(stage, run)


def _finished(runs: Path) -> Path | None:
    return next((marker.parent for marker in sorted(runs.glob("*/finished"), reverse=True)), None)


def _export(stage: str, run: Path) -> None:
    """Copy a stage's weights to the file that later stages load."""
    if stage in ("first-stage", "decoder"):
        from ldm.checkpoint import read_state_dict, save_state_dict

        state = read_state_dict(run / "checkpoints" / "last.ckpt")
        kept = {key: value for key, value in state.items() if not key.startswith("loss.")}
        print(f"wrote {save_state_dict(kept, BUILD / f'{stage}.safetensors')}")


def assemble_model(out: Path, judge_out: Path) -> None:
    """Write the averaged denoiser with first stage and text encoder as one file, both towers, and the judge."""
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import load_model_from_config, load_state, read_state_dict, save_state_dict
    from ldm.evaluation.judge import AttributeJudge
    from ldm.files import write_text
    from ldm.models.two_towers import TwoTowers

    run = _finished(BUILD / "runs" / "ldm")
    if run is None:
        raise UserError("the denoiser is not trained yet; run: python scripts/embedded_model.py train")
    model = load_model_from_config(ROOT / "configs/creatures/ldm.yaml", run / "checkpoints" / "last.ckpt")
    load_state(model.first_stage_model, read_state_dict(BUILD / "decoder.safetensors"), source="the decoder")
    with model.ema_scope():
        state = {key: value for key, value in model.state_dict().items() if not key.startswith("model_ema.")}
        path = save_state_dict(state, out / "model.safetensors", torch.float16)
    node = OmegaConf.load(ROOT / FINETUNE).model
    node.pop("base_learning_rate")
    text = "# The embedded model's configuration, for training and generation. Written by scripts/embedded_model.py.\n"
    write_text(out / "config.yaml", text + OmegaConf.to_yaml(OmegaConf.create({"model": node})))
    TwoTowers.load(BUILD / "clip").save(out / "towers", torch.float16)
    AttributeJudge.load(BUILD / "judge").save(judge_out)
    print(
        f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB), config.yaml and towers beside it, and {judge_out}"
    )


if __name__ == "__main__":
    sys.exit(main())
