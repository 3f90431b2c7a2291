"""The command line of scripts/embedded_model.py."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.checkpoint import read_state_dict
from scripts import embedded_model


def test_unknown_arguments_of_assemble_are_an_error(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert embedded_model.main(["assemble", "--outt", "elsewhere"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --outt elsewhere (see --help)\n"
    assert embedded_model.main(["assemble"]) == 1
    assert capsys.readouterr().err.startswith("error: the denoiser is not trained yet")


def test_overrides_are_passed_on_to_main(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(embedded_model, "train_stages", lambda *words: seen.append(words))
    assert embedded_model.main(["train", "--stage", "ldm", "--max_steps", "5"]) == 0
    assert seen == [(["ldm"], False, ["--max_steps", "5"])]


@pytest.mark.parametrize(
    ("stage", "wrote"), [("first-stage", "first-stage"), ("decoder", "decoder"), ("ldm", None)]
)
def test_a_stage_writes_its_weights_where_the_next_reads_them(stage, wrote, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def trained(command, **_):
        folder = Path(command[command.index("-l") + 1]) / "run" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(
            {"state_dict": {"decoder.w": torch.ones(2), "loss.v": torch.ones(1)}}, folder / "last.ckpt"
        )
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", trained)
    assert embedded_model.main(["train", "--stage", stage]) == 0
    found = sorted(path.stem for path in embedded_model.BUILD.glob("*.safetensors"))
    assert found == ([wrote] if wrote else [])
    if wrote:
        assert set(read_state_dict(embedded_model.BUILD / f"{wrote}.safetensors")) == {"decoder.w"}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    assert embedded_model.main(["train", "--stage", stage]) == 0
