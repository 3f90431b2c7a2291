"""The run folder's name and parts."""

import datetime
import re

import pytest

from ldm.training import run_folder
from ldm.util import UserError


def test_name_is_the_originals(tmp_path):
    run = run_folder.new_run_folder(tmp_path, name="txt2img", data_root="data/cat/", postfix="_x")
    assert re.fullmatch(r"cat\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_txt2img_x", run.path.name)
    assert run.last == run.path / "checkpoints" / "last.ckpt"
    assert run.embeddings == run.path / "checkpoints" / "embeddings.pt"
    assert not run.path.exists()


def test_several_roots_and_none(tmp_path):
    assert run_folder.new_run_folder(
        tmp_path, name="", data_root={"*": "a/cat", "@": "a/dog"}
    ).path.name.startswith("cat+dog2")
    assert run_folder.new_run_folder(tmp_path, name="n").path.name.startswith("2")


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
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


def made(folder):
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "t-project.yaml").write_text("model: {}")
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    return folder


def test_resuming_by_folder_file_and_latest(tmp_path):
    folder = made(tmp_path / "one")
    for place in (folder, folder / "checkpoints" / "last.ckpt", "latest"):
        run, state = run_folder.existing_run_folder(place, logdir=tmp_path)
        assert run.path.resolve() == folder.resolve()
        assert state.name == "last.ckpt"


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_folder.existing_run_folder(tmp_path / "no")
    with pytest.raises(UserError, match="no run in .* has a last.ckpt"):
        run_folder.existing_run_folder("latest", logdir=tmp_path)
    folder = made(tmp_path / "one")
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(UserError, match="ended before its first save"):
        run_folder.existing_run_folder(folder)
    (folder / "configs" / "t-project.yaml").unlink()
    with pytest.raises(UserError, match="no YAML"):
        run_folder.existing_run_folder(folder)
