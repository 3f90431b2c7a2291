"""The scripts are the commands of the library, and run from a checkout that is not installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ldm import commands

ROOT = Path(__file__).resolve().parents[2]
# Without site-packages and PYTHONPATH: neither torch nor an installed copy of the library can be imported.
BARE_PYTHON = (sys.executable, "-S", "-E")
SCRIPTS = {
    "txt2img": "generate:main",
    "stable_txt2img": "generate:stable_main",
    "embeddings": "embeddings:main",
    "merge_embeddings": "embeddings:merge_main",
    "evaluate_model": "evaluate:main",
    "export_diffusers": "export:main",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_a_command_of_the_library(name: str) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    command = getattr(importlib.import_module(f"{commands.__name__}.{module}"), function)
    assert importlib.import_module(f"scripts.{name}").main is command


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_any_folder_of_a_checkout_that_is_not_installed(name: str, tmp_path) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    done = subprocess.run(
        [*BARE_PYTHON, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py ")


def test_a_script_ends_with_the_exit_code_of_its_command(tmp_path) -> None:
    command = [*BARE_PYTHON, ROOT / "scripts" / "txt2img.py", "--ckpt", "gone.ckpt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: 'gone.ckpt' does not exist; check the path\n")


def test_a_script_runs_as_a_module_too(tmp_path) -> None:
    command = [*BARE_PYTHON, "-m", "scripts.merge_embeddings", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
