"""The phases of benchmarks/study/inversions.py, with main.py replaced and the model of a golden record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.study import inversions, invert, measure
from ldm.embeddings import Concept, LearnedEmbeddings, write
from ldm.images import open_image
from tests.evaluation.stand_ins import use_few_renderings
from tests.golden_record import Golden

TINY = [
    "--creatures",
    "2",
    "--seeds",
    "1",
    "--samples",
    "2",
    "--edit_samples",
    "1",
    "--ddim_steps",
    "1",
    "--scale",
    "1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studied")
    return Golden("clip_one_vector").write_model(folder)


class MainPy:
    """Stands in for main.py; run number `fails` exits with `code` and writes nothing."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails, self.code = 0, 1

    def run(self, command, *, stdout, env, **rest) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.env = env
        stdout.write("some lines\nthe last line\n")
        if len(self.commands) == self.fails:
            return subprocess.CompletedProcess(command, self.code)
        vectors = int(command[-1].rpartition("=")[2])
        folder = Path(command[command.index("-l") + 1]) / "run" / "checkpoints"
        folder.mkdir(parents=True)
        concept = Concept("*", torch.full((vectors, 32), 0.1))
        write(LearnedEmbeddings((concept,)), folder / "embeddings.pt", "original")
        return subprocess.CompletedProcess(command, 0)

    def value(self, number: int, flag: str) -> str:
        return self.commands[number][self.commands[number].index(flag) + 1]


@pytest.fixture
def main_py(monkeypatch) -> MainPy:
    stand_in = MainPy()
    monkeypatch.setattr(invert.subprocess, "run", stand_in.run)
    return stand_in


@pytest.fixture
def run(model, tmp_path, capsys):
    def run(phase: str, *arguments: str):
        base = [phase, "--out", str(tmp_path / "study"), "--ckpt_path", str(model), "--judge", "none"]
        code = inversions.main([*base, *TINY, *arguments])
        return code, capsys.readouterr()

    return run


def test_each_inversion_is_a_command_that_a_user_could_type(run, main_py, tmp_path, model) -> None:
    code, output = run("invert", "--vectors", "1", "2", "--steps", "20", "--threads", "3")
    assert code == 0, output.err
    assert [main_py.value(k, "-n") for k in range(8)] == [
        f"{name}-v{vectors}-s0" for vectors in (1, 2) for name in ("c000", "c001", "draft", "dusk")
    ]
    first, style, several = (main_py.commands[k] for k in (0, 2, 4))
    assert first[1].endswith("main.py") and main_py.value(0, "--actual_resume") == str(model)
    assert main_py.value(0, "--data_root") == str(tmp_path / "study/concepts/c000")
    assert main_py.value(0, "--max_steps") == "20" and main_py.value(0, "--seed") == "0"
    assert main_py.value(0, "--base").endswith("txt2img-finetune.yaml")
    assert main_py.value(2, "--base").endswith("txt2img-finetune_style.yaml") and "painting" in style
    assert "--scale_lr" not in first and "model.base_learning_rate=0.01" in several
    assert main_py.env["OMP_NUM_THREADS"] == "3"
    truth = json.loads((tmp_path / "study/concepts/c000/concept.json").read_text())
    assert 12_000_000 <= truth["creature"]["seed"] < 13_000_000
    record = json.loads((tmp_path / "study/inversions/c000-v2-s0.json").read_text())
    assert record["seconds"] >= 0 and record["settings"]["steps"] == 20 and record["vectors"] == 2
    assert not list((tmp_path / "study/runs").glob("*/run"))


def test_captions_are_used_on_request(run, main_py, tmp_path) -> None:
    assert run("invert", "--vectors", "1", "--captions")[0] == 0
    assert all("data.params.train.params.use_captions=true" in command for command in main_py.commands)
    assert (tmp_path / "study/concepts/c000/05.txt").is_file()
    code, output = run("invert", "--vectors", "1")
    assert code == 1 and "captions" in output.err


def test_an_interrupted_study_continues(run, main_py, tmp_path) -> None:
    main_py.fails, main_py.code = 2, 130
    arguments = ["--vectors", "1", "--no_styles"]
    assert run("invert", *arguments)[0] == 130
    code, output = run("invert", *arguments)
    assert code == 0, output.err
    made = len(main_py.commands)
    assert sorted(p.stem for p in (tmp_path / "study/inversions").glob("*.pt")) == [
        "c000-v1-s0",
        "c001-v1-s0",
    ]
    assert run("invert", *arguments)[0] == 0 and len(main_py.commands) == made
    code, output = run("invert", *arguments, "--rate", "0.1")
    assert code == 1 and "made with rate None, not 0.1" in output.err and output.err.count("error: ") == 1
    run("invert", *arguments, "--seeds", "2")
    assert len(main_py.commands) == made + 2


def test_a_failed_inversion_reports_its_last_line(run, main_py, tmp_path) -> None:
    main_py.fails = 1
    code, output = run("invert", "--vectors", "1", "--no_styles")
    assert code == 1 and "c000-v1-s0 failed (the last line)" in output.err
    assert (tmp_path / "study/runs/c000-v1-s0/output.txt").is_file()
    assert not (tmp_path / "study/inversions/c000-v1-s0.json").exists()


def test_all_phases_end_in_tables_and_a_sheet(run, main_py, tmp_path, monkeypatch) -> None:
    use_few_renderings(monkeypatch)
    code, output = run("all", "--vectors", "1", "2")
    assert code == 0, output.err
    found = json.loads((tmp_path / "study/study.json").read_text())
    assert found["inversions"] == {"planned": 8, "measured": 8}
    assert set(found["vectors"]) == {"1", "2"} and found["vectors"]["1"]["identity"]["n"] == 2
    assert found["vectors"]["2"]["plain both"]["mean"] <= 1 and found["vectors"]["1"]["seconds"]["n"] == 2
    assert found["references"]["redrawn"]["identity"]["mean"] == pytest.approx(1, abs=0.01)
    assert {"a photo of a creature", "best caption in words", "redrawn, through the first stage"} <= set(
        found["references"]
    )
    assert set(found["styles"]) == {
        f"{name}, {n}" for name in ("draft", "dusk") for n in ("1 vector", "2 vectors")
    }
    assert any(bar["met"] is None for bar in found["bars"]) and any(
        bar["met"] is not None for bar in found["bars"]
    )
    text = (tmp_path / "study/study.md").read_text()
    assert "8 of 8 inversions" in text and "| best caption in words |" in text and "not measured" in text
    assert open_image(tmp_path / "study/study.png").height > 1000

    def never(options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(measure, "load_evaluation", never)
    assert run("measure", "--vectors", "1", "2")[0] == 0
    with pytest.raises(AssertionError, match="loaded"):
        run("measure", "--vectors", "1", "2", "--ddim_steps", "2")


@pytest.mark.parametrize(
    "phase, arguments, message",
    [
        ("measure", [], "has no inversions"),
        ("report", [], "has no figures"),
        ("invert", ["--override", "max_steps"], "is not KEY=VALUE"),
        ("invert", ["--recipe", "absent.yaml"], "'absent.yaml' does not exist"),
        ("invert", ["--vectors", "0"], "not a positive whole number"),
        ("draw", [], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(phase, arguments, message, run, main_py) -> None:
    code, output = run(phase, *arguments)
    assert code in (1, 2) and message in output.err and output.err.count("\n") == 1
    assert not main_py.commands
