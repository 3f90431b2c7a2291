from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ldm.embeddings import read
from scripts.merge_embeddings import main
from tests.embeddings.samples import GOLDEN, vectors

ONE = GOLDEN / "clip_one_vector" / "embeddings.pt"
THREE = GOLDEN / "clip_three_vectors" / "embeddings.pt"


def run(tmp_path, *arguments: object) -> None:
    main(["--output_path", str(tmp_path / "out.pt"), *map(str, arguments)])


def test_the_originals_command_line(tmp_path, capsys):
    other = tmp_path / "dog.safetensors"
    save_file({"emb_params": vectors(2, 32)}, other)
    run(tmp_path, "--manager_ckpts", ONE, other, "-sd")
    content = read(tmp_path / "out.pt")
    assert content.format == "original" and content.triggers == ["*", "dog"]
    assert torch.equal(content.concepts[0].vectors, read(ONE).concepts[0].vectors)
    assert content.concepts[0].token == 265
    assert "'dog': 2 x 32" in capsys.readouterr().out
    run(tmp_path, "--manager_ckpts", ONE, other, "--config", "any.yaml", "--stable_diffusion")


def test_a_clash_is_reported_and_nothing_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "--manager_ckpts", ONE, THREE)
    assert caught.value.code == 1 and not (tmp_path / "out.pt").exists()
    error = capsys.readouterr().err
    assert "both have the trigger '*'" in error and error.count("\n") == 1


def test_a_clash_is_renamed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it must not ask"))
    run(tmp_path, "--manager_ckpts", ONE, THREE, "--rename", "*=@")
    assert [len(c.vectors) for c in read(tmp_path / "out.pt").concepts] == [1, 3]
    assert "'*' is now '@'" in capsys.readouterr().out
    run(tmp_path, "--manager_ckpts", ONE, THREE, "--auto_rename")
    assert read(tmp_path / "out.pt").triggers == ["*", "<embeddings>"]


def test_bert_where_the_file_does_not_say(tmp_path):
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "x.safetensors")
    run(tmp_path, "--manager_ckpts", tmp_path / "x.safetensors", "--use_bert")
    assert read(tmp_path / "out.pt").concepts[0].encoder == "bert"


def test_missing_arguments_are_a_usage_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--output_path", "x"])
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err
