"""The notebooks: clean files, and what they write and show when they are executed."""

from __future__ import annotations

import ast
import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ldm
from ldm.files import CHECKOUT

NOTEBOOKS = sorted((CHECKOUT / "scripts").glob("*.ipynb"))
TIMEOUT = 900  # seconds for one cell, on a machine that is busy with other things
# How many pictures each shows, and what it writes.
RESULTS = {
    "train_concept": (4, {"embeddings/bobo.safetensors": "<bobo>"}, ["train_concept.png"]),
    "use_concepts": (
        4,
        {
            "sample-words/bobo.safetensors": "<bobo>",
            "sample-words/fifi.safetensors": "<fifi>",
            "use_concepts/mix.safetensors": "<mix>",
        },
        [f"use_concepts/{name}.png" for name in ("00", "guidance", "mixed", "together")],
    ),
}


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_all_notebooks_are_tested() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(RESULTS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["nbformat_minor"] >= 5
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["metadata"], dict)
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]), filename=f"{path.name}, cell {cell['id']}")
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert "outputs" not in cell


def test_both_notebooks_begin_alike() -> None:
    first, second = (
        [c["source"] for c in cells_of(path) if c["cell_type"] == "code"][0] for path in NOTEBOOKS
    )
    assert first == second


def test_the_first_cell_on_a_machine_without_the_package(tmp_path, monkeypatch) -> None:
    source = next("".join(c["source"]) for c in cells_of(NOTEBOOKS[0]) if c["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    exec(compile(source, "cell", "exec"), {})  # the package is here: nothing happens
    assert Path.cwd() == tmp_path and set(tmp_path.iterdir()) == before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no copy of the repository") as said:
        exec(compile(source, "cell", "exec"), {})
    assert "REPOSITORY" in str(said.value) and len(str(said.value)) < 300
    commands: list[list[str]] = []
    codes = {"git": 1, "pip": 1}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, codes["git" if command[0] == "git" else "pip"])

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("sys.path", list(sys.path))
    filled = source.replace('REPOSITORY = ""', 'REPOSITORY = "https://host/repo.git"')
    with pytest.raises(SystemExit, match="git cannot clone 'https://host/repo.git'"):
        exec(compile(filled, "cell", "exec"), {})
    codes["git"] = 0
    with pytest.raises(SystemExit, match="pip could not install"):
        exec(compile(filled, "cell", "exec"), {})
    codes["pip"] = 0
    exec(compile(filled, "cell", "exec"), {})
    assert "clone" in commands[0] and "https://host/repo.git" in commands[0]
    assert commands[-1][1:4] == ["-m", "pip", "install"] and sys.path[0] == commands[-1][-1]
    commands.clear()
    (tmp_path / "uploaded" / "ldm").mkdir(parents=True)
    (tmp_path / "uploaded" / "ldm" / "__init__.py").touch()
    exec(compile(source, "cell", "exec"), {})  # a folder beside the notebook needs no address
    assert [command[-1] for command in commands] == [str(tmp_path / "uploaded")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that run the kernel
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path, monkeypatch) -> None:
    reason = "the notebooks are executed where '.[notebooks]' is installed (make test-notebooks)"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more only wait for each other where cores are busy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    least, words, images = RESULTS[path.stem]
    assert len(pictures) >= least
    written = tmp_path / "outputs"
    for file, word in words.items():
        concept = ldm.load(written / file)
        assert concept.word == word and concept.vectors.isfinite().all() and concept.vectors.std() > 0
    for picture in [*pictures, *(Image.open(written / file) for file in images)]:
        colours = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert min(picture.size) >= 32 and len(colours) > 100, "a picture is blank"
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
