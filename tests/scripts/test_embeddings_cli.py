from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.embeddings import read, write
from scripts.embeddings import main
from tests.embeddings.samples import GOLDEN, a1111_dict, learned, vectors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cat(tmp_path) -> Path:
    torch.save(a1111_dict(), tmp_path / "cat.pt")
    return tmp_path / "cat.pt"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    table = vectors(49408, 32, seed=3)
    save_file(
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": table},
        tmp_path / "m.safetensors",
    )
    return tmp_path / "m.safetensors"


def fails(capsys, code: int, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_inspect_for_people(cat, capsys):
    main(["inspect", str(cat), str(GOLDEN / "clip_one_vector" / "embeddings.pt")])
    said = capsys.readouterr().out
    for words in (
        "cat.pt: a1111",
        "trigger     cat",
        "2 vectors, 768 wide: for Stable Diffusion 1.x",
        "v1-5-pruned",
    ):
        assert words in said
    assert "embeddings.pt: original" in said and "1 vector, 32 wide" in said


def test_inspect_against_a_vocabulary(tmp_path, checkpoint, capsys):
    table = vectors(49408, 32, seed=3)
    torch.save({"<x>": table[[265, 320]]}, tmp_path / "x.bin")
    words = ["--tokenizer", str(GOLDEN / "clip_tiny")]
    main(["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint), *words])
    said = capsys.readouterr().out
    assert "nearest 1   * 1.00" in said and "nearest 2   a 1.00" in said and "vocabulary:" in said
    main(["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint), "--json", "--words", "1"])
    [report] = json.loads(capsys.readouterr().out)
    assert report["concepts"][0]["nearest"][0][0][0] == "#265"


def test_a_tokenizer_folder_with_weights_is_enough(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("a\nb\nc\n")
    save_file({"text_model.embeddings.token_embedding.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    torch.save({"<x>": torch.tensor([0.0, 2.0, 0.0])}, tmp_path / "x.bin")
    main(["inspect", str(tmp_path / "x.bin"), "--tokenizer", str(tmp_path), "--words", "1"])
    assert "nearest 1   b 1.00" in capsys.readouterr().out


def test_the_words_are_those_of_the_checkpoints_tokenizer(tmp_path, checkpoint, capsys):
    torch.save({"<x>": vectors(49408, 32, seed=3)[[320]]}, tmp_path / "x.bin")
    command = ["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint)]
    encoder = "cond_stage_config: {target: x.FrozenCLIPEmbedder, params: {version: %s}}"
    for version, word in (
        (GOLDEN / "clip_tiny", "a"),
        ("nobody/nothing", "#320"),
        ("no/such/folder", "#320"),
    ):
        (tmp_path / "config.yaml").write_text("model: {params: {%s}}" % (encoder % version))  # noqa: UP031
        main(command)
        assert f"nearest 1   {word} 1.00" in capsys.readouterr().out
    for damaged in ("[1", "[1]", "a: b", "model: {params: {cond_stage_config: __is_unconditional__}}"):
        (tmp_path / "config.yaml").write_text(damaged)
        main(command)
        assert "nearest 1   #320 1.00" in capsys.readouterr().out


def test_inspect_of_another_width_says_so(cat, checkpoint, capsys):
    main(["inspect", str(cat), "--ckpt_path", str(checkpoint)])
    assert "vocabulary is 32 wide" in capsys.readouterr().out


def test_inspect_as_json_and_a_bad_file_among_good_ones(tmp_path, cat, capsys):
    (tmp_path / "bad.pt").write_text("<html>")
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(tmp_path / "bad.pt"), str(cat), "--json"])
    assert caught.value.code == 1
    said = capsys.readouterr()
    bad, good = json.loads(said.out)
    assert "web page" in bad["error"] and good["format"] == "a1111"
    assert good["concepts"][0]["width"] == 768 and good["metadata"]["steps"] == 499
    assert said.err.count("\n") == 1 and said.err.startswith("error: ")


def test_convert(cat, tmp_path, capsys):
    main(["convert", str(cat), "--to", "safetensors", "--trigger", "<my-cat>"])
    assert f"wrote {tmp_path / 'my-cat.safetensors'}" in capsys.readouterr().out
    found = read(tmp_path / "my-cat.safetensors")
    assert found.triggers == ["<my-cat>"] and torch.equal(found.concepts[0].vectors, vectors())
    main(["convert", str(cat), "--to", "original", "-o", str(tmp_path / "sub" / "x.pt")])
    assert read(tmp_path / "sub" / "x.pt").format == "original"


def test_convert_to_a_picture_with_a_preview(cat, tmp_path):
    Image.new("RGB", (300, 300), (1, 2, 250)).save(tmp_path / "p.png")
    main(
        [
            "convert",
            str(cat),
            "--to",
            "a1111-png",
            "-o",
            str(tmp_path / "c.png"),
            "--preview",
            str(tmp_path / "p.png"),
        ]
    )
    assert (np.array(Image.open(tmp_path / "c.png"))[150, 150] == [1, 2, 250]).all()
    assert read(tmp_path / "c.png").triggers == ["cat"]


def test_convert_overwrites_only_when_told(cat, capsys):
    before = cat.read_bytes()
    assert "--overwrite" in fails(capsys, 1, "convert", cat, "--to", "original")
    assert cat.read_bytes() == before
    main(["convert", str(cat), "--to", "original", "--overwrite"])
    assert read(cat).format == "original"


def test_convert_of_1280_wants_the_encoder(tmp_path, capsys):
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "x.safetensors")
    command = ["convert", tmp_path / "x.safetensors", "--to", "safetensors", "-o", tmp_path / "y.safetensors"]
    assert "--encoder bert" in fails(capsys, 1, *command)
    main([*map(str, command), "--encoder", "bert"])
    assert read(tmp_path / "y.safetensors").concepts[0].encoder == "bert"


def test_convert_of_several_triggers(tmp_path, capsys):
    both = GOLDEN / "embeddings_torch_1_10_layout.pt"
    assert "split it first" in fails(capsys, 2, "convert", both, "--to", "a1111", "--trigger", "x")
    main(["convert", str(both), "--to", "a1111", "-o", str(tmp_path)])
    written = {path.name: read(path).triggers for path in (tmp_path / "a1111").iterdir()}
    assert written == {"embedding.pt": ["*"], "embedding-2.pt": ["@"]}


def test_merge_and_split(cat, tmp_path, capsys):
    dog = write(learned("cat", seed=1), tmp_path / "dog.safetensors")
    out = tmp_path / "both.pt"
    assert "--rename 'cat=NEW'" in fails(capsys, 1, "merge", cat, dog, "-o", out)
    assert not out.exists()
    main(["merge", str(cat), str(dog), "-o", str(out), "--rename", "cat=<dog>"])
    assert "dog.safetensors: 'cat' is now '<dog>'" in capsys.readouterr().out
    assert read(out).triggers == ["cat", "<dog>"]
    main(["split", str(out), "-o", str(tmp_path / "words"), "--to", "safetensors"])
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == [
        "cat.safetensors",
        "dog.safetensors",
    ]
    main(["merge", str(cat), str(dog), "-o", str(tmp_path / "m"), "--auto_rename", "--to", "diffusers"])
    assert sorted(path.name for path in (tmp_path / "m" / "diffusers").iterdir()) == [
        "cat.safetensors",
        "dog.safetensors",
    ]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert fails(capsys, 1, "inspect", tmp_path / "absent.pt").count("\n") == 1
    assert "old=new" in fails(capsys, 2, "merge", tmp_path / "a", "-o", tmp_path / "b", "--rename", "x")
    assert "error: " in fails(capsys, 2, "convert", tmp_path / "a", "--to", "pickle")
    assert "error: " in fails(capsys, 2)


@pytest.mark.parametrize("script", ["embeddings.py", "merge_embeddings.py"])
def test_it_runs_as_a_command_of_a_checkout(script, cat, tmp_path):
    arguments = ["inspect", cat]
    if script == "merge_embeddings.py":
        arguments = ["--manager_ckpts", cat, "--output_path", tmp_path / "both.pt"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        cwd=tmp_path,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "cat" in done.stdout, done.stderr
