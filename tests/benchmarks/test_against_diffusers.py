"""The comparison of whole processes, with a stand-in for diffusers' script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import against_diffusers
from benchmarks.against_diffusers import OURS, THEIRS, Run, call, fill, learned, renamed, size_of
from benchmarks.machine import ROOT
from benchmarks.report import Report
from ldm.commands.base import MODEL
from ldm.embeddings import read
from ldm.util import UserError

STAND_IN = """
import argparse, os, torch
from safetensors.torch import save_file
parser = argparse.ArgumentParser()
parser.add_argument("--train_data_dir"), parser.add_argument("--placeholder_token"), parser.add_argument("--output_dir")
options, others = parser.parse_known_args()
assert sorted(os.listdir(options.train_data_dir)) == [f"0{n}.png" for n in range(1, 6)], "nothing but images"
assert others[others.index("--initializer_token") + 1] == "bear" and others[others.index("--resolution") + 1] == "32"
file = os.path.join(options.output_dir, "learned_embeds.safetensors")
save_file({options.placeholder_token: torch.zeros(1, 192)}, file, {"format": "pt"})
"""


def test_their_script_gets_only_images_and_its_word_is_judged(tmp_path: Path) -> None:
    script = tmp_path / "textual_inversion.py"
    script.write_text(STAND_IN)
    run = Run(THEIRS, ROOT / "data" / "concepts" / "bobo", tmp_path / "run")
    options = against_diffusers.argparse.Namespace(
        python=sys.executable, script=script, steps=3, rate="5e-3", batch_size=2, model=ROOT / MODEL
    )
    against_diffusers.train(run, options, tmp_path / "exported")
    assert json.loads(run.facts.read_text())["seconds"] > 0 and learned(run).is_file()
    assert read(renamed(run)).triggers == ["*"]
    script.unlink()
    against_diffusers.train(run, options, tmp_path / "exported")  # a finished run is kept


def test_a_process_that_fails_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no module named accelerate')")
    with pytest.raises(UserError, match=r"fails.py ended with code 1 \(no module named accelerate\)"):
        call([sys.executable, script], tmp_path / "out")
    script.write_text(
        "print('Some weights of CLIPTextModel were not initialized and are newly initialized: ...')"
    )
    with pytest.raises(UserError, match="fails.py took random weights"):
        call([sys.executable, script], tmp_path / "out")
    assert against_diffusers.main(["--script", str(tmp_path / "none.py")]) == 1


def test_the_size_is_the_models() -> None:
    assert size_of(ROOT / MODEL) == 32


def test_comparisons_are_paired_by_creature() -> None:
    one = {"seconds": 50.0, "identity": 0.8, "edits": 0.9}
    found = {
        name: {
            THEIRS: {"seconds": slow * 50.0, "identity": base, "edits": 0.9},
            "default": {**one, "seconds": slow * 30.0, "identity": base + 0.1},
            "fast": {**one, "seconds": slow * 20.0, "identity": base},
            "prospect_residual": {**one, "seconds": slow * 35.0, "identity": base + 0.2},
            "prospect_residual_fast": {**one, "seconds": slow * 14.0, "identity": base + 0.2},
        }
        for name, slow, base in (("a", 1, 0.5), ("b", 4, 0.7))
    }
    report = Report("t", "T", ("creature", "contestant", "s", "of", "identity", "edits"), {})
    fill(report, found)
    assert len(report.rows) == 10 and report.rows[1][3] == "0.60"
    assert "default takes 0.60 (0.60 to 0.60)" in report.notes[0] and "<= 0.6: met" in report.notes[0]
    assert "identity +0.100" in report.notes[0] and "missed by 33%" in report.notes[1]
    assert "identity +0.100 (+0.100 to +0.100), mean +0.100 ± 0.000, below in 0 of 2" in report.notes[0]
    # A contestant without an aim is measured, not judged.
    assert (
        "prospect_residual takes 0.70 (0.70 to 0.70) of the time of diffusers' script; identity +0.200"
        in (report.notes[2])
    )
    assert "prospect_residual_fast takes 0.28" in report.notes[3] and "<= 0.3: met" in report.notes[3]
    assert set(OURS) == {"default", "fast", "prospect_residual", "prospect_residual_fast"}


def test_both_keep_their_bytecode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Python does by itself: otherwise every process of ours would compile this repository anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("ANOTHER", "kept")
    (tmp_path / "module.py").write_text("x = 1")
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); import module; assert os.environ['ANOTHER'] == 'kept'"
    call([sys.executable, "-c", code, tmp_path], tmp_path / "run")
    assert list((tmp_path / "__pycache__").glob("module.*.pyc"))
