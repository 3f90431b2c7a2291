"""The run folder: its name, resuming, and its lock."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from ldm import embeddings
from ldm.front_ends import speaking_as
from ldm.training import run_folder
from ldm.training.run_folder import locked
from ldm.util import UserError


@pytest.fixture(autouse=True)
def as_a_command():
    """Messages name flags."""
    with speaking_as("command"):
        yield


def test_name_as_in_the_original(tmp_path):
    run = run_folder.new_run_folder(tmp_path, name="txt2img", data_root="data/cat/", postfix="_x")
    assert re.fullmatch(r"cat\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_txt2img_x", run.path.name)
    assert run.last == run.path / "checkpoints" / "last.ckpt"
    assert run.embeddings == run.path / "checkpoints" / "embeddings.pt"
    assert not run.path.exists()


def test_name_with_several_data_roots_and_none(tmp_path):
    assert run_folder.new_run_folder(
        tmp_path, name="", data_root={"*": "a/cat", "@": "a/dog"}
    ).path.name.startswith("cat+dog2")
    assert run_folder.new_run_folder(tmp_path, name="n").path.name.startswith("2")


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    noon = datetime.datetime(2024, 1, 2, 12)
    monkeypatch.setattr(run_folder, "datetime", type("Still", (), {"now": lambda: noon}))
    first = run_folder.new_run_folder(tmp_path, name="a")
    first.path.mkdir()
    assert run_folder.new_run_folder(tmp_path, name="a").path.name == first.path.name + "-2"


def test_processes_of_one_run_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LDM_RUN_DIR", raising=False)
    monkeypatch.setenv("LDM_RUN_DIR", "")
    first = run_folder.new_run_folder(tmp_path, name="a", several=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_folder.new_run_folder(tmp_path, name="other", several=True).path == first.path


def make_run(folder):
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "t-project.yaml").write_text("model: {}")
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    return folder


@pytest.mark.one_reader
def test_resume_by_folder_file_and_latest(tmp_path):
    folder = make_run(tmp_path / "one")
    for place in (folder, folder / "checkpoints" / "last.ckpt", "latest"):
        run, state = run_folder.existing_run_folder(place, logdir=tmp_path)
        assert run.path.resolve() == folder.resolve()
        assert state.name == "last.ckpt"


@pytest.mark.parametrize("newer", ["a", "b", "c"])
def test_latest_is_the_run_that_was_saved_last(tmp_path, newer):
    for name in ("b", "a", "c"):
        state = make_run(tmp_path / name) / "checkpoints" / "last.ckpt"
        os.utime(state, (2000, 2000) if name == newer else (1000, 1000))
    run, _ = run_folder.existing_run_folder("latest", logdir=tmp_path)
    assert run.path.name == newer


def test_two_starts_in_one_folder_in_one_second(tmp_path, monkeypatch):
    noon = datetime.datetime(2024, 1, 2, 12)
    monkeypatch.setattr(run_folder, "datetime", type("Still", (), {"now": lambda: noon}))
    folder = make_run(tmp_path / "one")
    starts = []
    for number in range(3):
        run, _ = run_folder.existing_run_folder(folder)
        starts.append(run.now)
        (folder / "configs" / f"{run.now}-project.yaml").write_text(f"start: {number}")
        if number == 1:  # a start that failed before it wrote its YAML
            (folder / "configs" / f"{run.now}-project.yaml").unlink()
            (folder / "csv" / run.now).mkdir(parents=True)
    assert starts == ["2024-01-02T12-00-00", "2024-01-02T12-00-00.2", "2024-01-02T12-00-00.3"]
    assert [path.read_text()[-1] for path in run.saved_configs()] == ["0", "2", "}"]


def vectors(path, word="*", value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    concept = embeddings.Concept(word, torch.full((1, 32), value))
    return embeddings.write(embeddings.LearnedEmbeddings((concept,)), path)


@pytest.mark.one_reader
@pytest.mark.parametrize(
    "place",
    [
        "one/",
        "one/checkpoints",
        "one/configs",
        "one/configs/t-project.yaml",
        "one/checkpoints/last.ckpt",
        "NAME",
    ],
)
def test_every_place_in_a_run_leads_to_it(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one")
    run, state = run_folder.existing_run_folder("one" if place == "NAME" else place, logdir=tmp_path)
    assert (run.path, state) == (Path("one"), Path("one/checkpoints/last.ckpt"))


@pytest.mark.one_reader
def test_lightnings_word_for_the_newest_run(tmp_path):
    """A folder of that name comes first."""
    one = make_run(tmp_path / "logs" / "one")
    assert run_folder.existing_run_folder("last", logdir=tmp_path / "logs")[0].path == one
    with pytest.raises(UserError, match="-r last: no run in 'nowhere' has a last.ckpt; name a run"):
        run_folder.existing_run_folder("last", logdir="nowhere")


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("name", "is_latest"),
    [
        ("embeddings.pt", True),
        ("my-cat.safetensors", True),
        ("embeddings_gs-12.pt", True),
        ("my-cat_gs-12.safetensors", True),
        ("embeddings_gs-4.pt", False),
        ("my-cat_gs-4.safetensors", False),
        ("my-cat_best.safetensors", False),
        ("../embeddings.pt", False),
    ],
)
def test_which_files_hold_the_latest_vectors(tmp_path, name, is_latest):
    folder = make_run(tmp_path / "one")
    for step in (4, 12):
        for stem, suffix in (("embeddings", "pt"), ("my-cat", "safetensors")):
            (folder / "checkpoints" / f"{stem}_gs-{step}.{suffix}").write_bytes(b"x")
    for saved in ("embeddings.pt", "my-cat.safetensors", "my-cat_best.safetensors"):
        (folder / "checkpoints" / saved).write_bytes(b"x")
    assert run_folder.RunFolder(folder, "").is_latest(folder / "checkpoints" / name) is is_latest


@pytest.mark.one_reader
def test_another_state_of_a_run(tmp_path):
    folder = make_run(tmp_path / "one")
    state = folder / "checkpoints" / "trainstep_checkpoints" / "epoch=1.ckpt"
    state.parent.mkdir()
    state.write_bytes(b"x")
    run, found = run_folder.existing_run_folder(state)
    assert (run.path, found) == (folder, state)


@pytest.mark.one_reader
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("absent", "--flag 'absent' does not exist; name a run folder such as logs/<run>, or 'latest'"),
        (
            "checkpoint-500",
            "a run keeps its last state alone; name a run folder .* or 'latest' for the newest",
        ),
        (".", "'.': it holds runs and is none; name one of them, such as one$"),
        ("diffusers", "it holds a model and no run; a frozen model is given as --actual_resume diffusers"),
        ("photos", "it holds images and no run; training images are given as --data_root photos"),
        ("alone", "it is the checkpoints folder of a run outside of it; put it back into logs/<run> beside"),
        (
            "original",
            "begins from its vectors: --base YAML --embedding_manager_ckpt original/checkpoints/emb",
        ),
        ("latest", "--flag latest: no run in 'logs' has a last.ckpt"),
        ("empty", "--flag 'empty': no YAML in"),
        ("unsaved", "there is no 'unsaved/checkpoints/last.ckpt'; the run ended before its first save"),
        (
            "old",
            "there is no .* begin a new run from its vectors: .* --embedding_manager_ckpt old/checkpoints/emb",
        ),
        (
            "one/checkpoints/embeddings_gs-4.pt",
            "is not the state of a run: -r one goes on .* begins from vectors with",
        ),
        ("one/checkpoints/my-cat.safetensors", "--embedding_manager_ckpt one/checkpoints/my-cat.safetensors"),
        ("one/images/one.jpg", "is not the state of a run: -r one goes on from its last.ckpt$"),
        ("stray.safetensors", "it holds vectors; a new run begins from them with .* stray.safetensors"),
        (
            "moved.ckpt",
            "it is the state of a run outside its folder; put it back into logs/<run>/checkpoints",
        ),
        ("model.ckpt", "a frozen model is given as --actual_resume FILE"),
        ("page.ckpt", "a frozen model is given as --actual_resume FILE"),
    ],
)
def test_nothing_to_resume(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    one = make_run(Path("one"))
    vectors(one / "checkpoints" / "embeddings_gs-4.pt")
    vectors(one / "checkpoints" / "my-cat.safetensors")
    (one / "images").mkdir()
    (one / "images" / "one.jpg").write_bytes(b"image")
    for name in ("unsaved", "old"):
        (make_run(Path(name)) / "checkpoints" / "last.ckpt").unlink()
    vectors(Path("old/checkpoints/embeddings.pt"))
    for folder in ("empty", "diffusers", "photos", "alone"):
        Path(folder).mkdir()
    Path("diffusers/model_index.json").write_text("{}")
    Path("photos/a.JPG").write_bytes(b"x")
    Path("alone/last.ckpt").write_bytes(b"x")
    vectors(Path("original/checkpoints/embeddings.pt"))
    vectors(Path("stray.safetensors"))
    torch.save({"state_dict": {}, "loops": {}}, "moved.ckpt")
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}}, "model.ckpt")
    Path("page.ckpt").write_text("<html>")
    with pytest.raises(UserError, match=message) as caught:
        run_folder.existing_run_folder(place, flag="--flag")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("word", "run", "stem"),
    [
        ("*", "bobo", "bobo"),
        ("<my-cat>", "bobo", "my-cat"),
        ("<my big cat>", "bobo", "my_big_cat"),
        ("* *", "my run", "my_run"),
        ("кот", "bobo", "кот"),
        ("🐈", "bobo", "bobo"),
        ("*", "***", "embedding"),
        ("a/b", "bobo", "a_b"),
        ("con", "bobo", "con_"),
    ],
)
@pytest.mark.client_files
def test_file_names_can_be_typed(word, run, stem):
    assert run_folder.word_stem(word, run) == stem


@pytest.mark.parametrize(
    ("folder", "label", "stem"),
    [
        ("toy2024-01-02T12-00-00_tiny", "", "toy"),
        ("toy2024-01-02T12-00-00_tiny", "gandalf", "gandalf"),
        ("2024-01-02T12-00-00_tiny-2", "", "tiny-2"),
        ("2024-01-02T12-00-00-2", "", "2024-01-02T12-00-00-2"),
        ("renamed by hand", "", "renamed_by_hand"),
    ],
)
@pytest.mark.client_files
def test_the_run_is_the_name_of_a_word_without_letters(tmp_path, folder, label, stem):
    assert run_folder.RunFolder(tmp_path / folder, "", label).word_stems(["*"]) == {"*": stem}


@pytest.mark.client_files
def test_words_keep_their_files(tmp_path):
    """Those of earlier versions, and those of a folder that was renamed."""
    run = run_folder.RunFolder(tmp_path / "cat", "")
    vectors(run.checkpoints / "embedding.safetensors", "*")
    vectors(run.checkpoints / "embedding_gs-4.safetensors", "*")
    vectors(run.checkpoints / "embedding_best.safetensors", "<other>")
    (run.checkpoints / "broken.safetensors").write_bytes(b"x")
    assert run.word_stems(["*", "<cat>", "@", "cat"]) == {
        "*": "embedding",
        "<cat>": "cat",
        "@": "cat-2",
        "cat": "cat-3",
    }
    assert [path.name for path in run.word_files()] == ["broken.safetensors", "embedding.safetensors"]


HOLD = """
import sys
from ldm.training.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts a process that holds the lock of a folder."""
    started = []

    def start(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        root = Path(main.__file__).parent
        process = subprocess.Popen(command, cwd=root, text=True, **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_lock_is_held_until_its_process_ends(tmp_path, hold):
    other = hold(tmp_path)
    with pytest.raises(UserError, match=rf"another process \(process {other.pid}\)"), locked(tmp_path):
        pytest.fail("held by two")
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_further_processes_of_a_run_do_not_lock(tmp_path, hold):
    hold(tmp_path)
    with locked(tmp_path, hold=False):
        pass


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"), locked(tmp_path / "file" / "run"):
        pass


def test_second_run_in_a_folder_is_an_error(tiny_yaml, capsys, hold):
    assert main.main(["--base", str(tiny_yaml), "-t", "--max_steps", "1"]) == 0
    (run,) = Path("logs").iterdir()
    hold(run.absolute())
    state = (run / "checkpoints" / "last.ckpt").read_bytes()
    capsys.readouterr()
    assert main.main(["-r", str(run), "-t", "--max_steps", "2"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: another process")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == state
