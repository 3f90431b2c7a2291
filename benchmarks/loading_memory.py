"""Host memory that loading a full-size model takes, measured in a process of its own.

    python -m benchmarks.loading_memory sd1 --half float16
    python -m benchmarks.loading_memory sdxl --half float16

Writes a file with the names and shapes of the published model in half precision (its numbers are zeros; the file takes
no space on most disks), loads it on the CPU and reports the peak of the resident memory, which counts mapped pages of
the file too. `--half bfloat16` converts every weight on the way, `--half none` to float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.subjects import stand_in_encoder
from ldm.commands.base import guarded
from ldm.console import Parser
from ldm.util import UserError

MANIFESTS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base"}


def write_model(family: str, path: Path) -> int:
    """Write a file of safetensors with the published model's names and shapes; return its size in bytes."""
    manifest = ROOT / "tests" / "golden" / f"{MANIFESTS[family]}.state_dict.json"
    header: dict[str, object] = {}
    end = 0
    for name, shape in json.loads(manifest.read_text()).items():
        if name.startswith("embedding_manager.") or "." not in name:
            continue
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path.stat().st_size


def load(path: Path, encoder: Path, half: str, use: bool) -> None:
    """Load the model in this process and print the peak of its resident memory before and after."""
    import torch
    from omegaconf import OmegaConf

    from ldm.base_models import recognise
    from ldm.checkpoint import load_model_from_config

    node = OmegaConf.load(recognise(path).inference_config).model
    use_tokenizer(node, encoder)
    before, start = peak(), time.perf_counter()
    model = load_model_from_config(node, path, half=None if half == "none" else getattr(torch, half))
    seconds = time.perf_counter() - start
    if use:  # read every weight once, so that all mapped pages count
        for parameter in model.parameters():
            parameter.sum()
    count = sum(parameter.numel() for parameter in model.parameters())
    result = {"before": before, "peak": peak(), "seconds": seconds, "parameters": count}
    sys.stdout.write(json.dumps(result) + "\n")


def use_tokenizer(node: object, encoder: Path) -> None:
    """Name the folder in place of the hub's tokenizer and text encoder, wherever the node names one."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(node, ListConfig):
        for value in node:
            use_tokenizer(value, encoder)
    if not isinstance(node, DictConfig):
        return
    target = str(node.get("target") or "").rpartition(".")[2]
    if "CLIPEmbedder" in target or "SDXLEmbedder" in target:
        OmegaConf.update(node, "params.tokenizer", str(encoder), force_add=True)
        if "Open" not in target:
            OmegaConf.update(node, "params.version", str(encoder), force_add=True)
    for key in node:
        use_tokenizer(node[key], encoder)


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, after one line on stderr if it failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=MANIFESTS)
    parser.add_argument("--half", choices=("float16", "bfloat16", "none"), default="float16")
    parser.add_argument("--folder", type=Path, help="where the file is written (default: a temporary folder)")
    parser.add_argument("--no_use", action="store_true", help="do not read the weights after loading")
    parser.add_argument("--in_this_process", nargs=2, metavar=("FILE", "ENCODER"), help=argparse.SUPPRESS)
    return guarded(lambda: measure(parser.parse_args(argv)))


def measure(options: argparse.Namespace) -> None:
    """Write the file, load it in another process, and print a line."""
    if options.in_this_process:
        load(*map(Path, options.in_this_process), options.half, not options.no_use)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name) / "model.safetensors"
        size = write_model(options.family, path)
        encoder = stand_in_encoder(Path(name) / "text_encoder")
        command = [sys.executable, "-m", "benchmarks.loading_memory", options.family, "--half", options.half]
        command += ["--in_this_process", str(path), str(encoder), *(["--no_use"] if options.no_use else [])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"loading {options.family} failed: {last[:200]}")
    result = json.loads(done.stdout.splitlines()[-1])
    before, top, held = (number / 1e9 for number in (result["before"], result["peak"], size))
    sys.stdout.write(
        f"{options.family}, {result['parameters'] / 1e9:.2f} B parameters, layers in {options.half}: "
        f"file {held:.2f} GB, peak {top:.2f} GB ({before:.2f} GB of it before loading), {result['seconds']:.1f} s\n"
    )


if __name__ == "__main__":
    sys.exit(main())
