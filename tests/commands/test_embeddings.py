"""The command lines of scripts/embeddings.py and scripts/merge_embeddings.py."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import console
from ldm.commands import embeddings
from ldm.commands.embeddings import main, merge_main
from ldm.embeddings import FORMATS, Concept, LearnedEmbeddings, read, write
from ldm.embeddings.method_files import MethodFile, write_method_file
from ldm.images import open_image
from ldm.modules.methods import METHODS
from tests.commands.embeddings_calls import fails, run
from tests.embeddings.samples import GOLDEN, a1111_dict, learned, vectors


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


@pytest.mark.parametrize(
    "option",
    [["convert", "{}", "--to", "a1111", "--trigger", "a\u202eb"], ["merge", "{}", "--rename", "x=a\u202eb"]],
)
@pytest.mark.refused_first
def test_a_word_that_cannot_be_kept_is_refused_before_the_file_is_read(tmp_path, capsys, option):
    (tmp_path / "cat.pt").write_text("no embedding")
    arguments = [text.format(tmp_path / "cat.pt") for text in option]
    assert "holds the invisible direction mark" in fails(capsys, 1, *arguments, "-o", tmp_path / "out.pt")


def test_the_names_of_formats_are_those_of_the_writer():
    assert tuple(FORMATS) == embeddings.FORMAT_NAMES


def test_inspect_as_text(cat, capsys):
    run(["inspect", str(cat), str(GOLDEN / "clip_one_vector" / "embeddings.pt")])
    output = capsys.readouterr().out
    for words in (
        "cat.pt: a1111",
        "trigger     cat",
        "2 vectors, 768 wide: for Stable Diffusion 1.x",
        "v1-5-pruned",
    ):
        assert words in output
    assert "embeddings.pt: original" in output and "1 vector, 32 wide" in output


def test_inspect_a_file_of_a_method(tmp_path, capsys):
    tensors = {"vectors": torch.zeros(4, 1, 768)}
    file = tmp_path / "a.safetensors"
    write_method_file(MethodFile("grid", {"*": 1}, tensors, {}, {"strength": 0.8}, "clip", 768), file)
    assert main(["inspect", str(file)]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{file}: words of the method 'grid': '*' (1), for a model whose CLIP text")
    assert line.endswith("dials: strength=0.8\n  vectors     4 x 1 x 768, mean norm 0.000")
    assert main(["inspect", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[0]
    assert report["dials"] == {"strength": 0.8} and report["tensors"]["vectors"]["shape"] == [4, 1, 768]


@pytest.mark.parametrize("method", [*METHODS, "another tool"])
def test_commands_that_need_vectors_refuse_every_method_in_one_line(
    method, cat, checkpoint, tmp_path, capsys
):
    """What the file holds, that the command cannot use it, and what to do instead; nothing is written."""
    file, out = tmp_path / "a.safetensors", tmp_path / "out.pt"
    layers = {"IN01": torch.ones(1, 32), "MID": torch.ones(1, 32)}
    if method == "another tool":
        save_file(layers, file)
        method = "xti"
    else:
        tensors = layers if method == "xti" else {"vectors": torch.ones(4, 1, 32)}
        write_method_file(MethodFile(method, {"*": 1}, tensors, {}, {}, "clip", 32), file)
    held = f"'{file}': it holds words of the method '{method}', which are more than vectors; "
    for remedy, words in (
        (
            "the map between two models is for vectors, so train the word anew on the other model",
            ["transfer", file, "--from", checkpoint, "--to", checkpoint],
        ),
        (
            "generate and evaluate with them here",
            ["convert", file, "--to", "a1111"],
        ),
        ("which is named beside others to generate with several", ["merge", cat, file]),
        ("they stay together in their file, so use that", ["split", file]),
    ):
        said = fails(capsys, 1, *words, "-o", out)
        assert held in said and said.strip().endswith(remedy), said
        assert remedy in said and said.count("\n") == 1 and len(said) < 300 + len(str(tmp_path))
    assert not out.exists()


def test_a_damaged_file_of_a_method_does_not_end_the_report_on_others(cat, tmp_path, capsys):
    content = MethodFile(
        "grid", {"*": 1}, {"vectors": torch.full((4, 1, 8), float("nan"))}, {}, {}, "clip", 8
    )
    file = write_method_file(content, tmp_path / "a.safetensors")
    assert main(["inspect", str(file), str(cat)]) == 1
    said = capsys.readouterr()
    assert "cat.pt: a1111" in said.out and "it holds NaN" in said.err


def test_inspect_against_a_vocabulary(tmp_path, checkpoint, capsys):
    table = vectors(49408, 32, seed=3)
    torch.save({"<x>": table[[265, 320]]}, tmp_path / "x.bin")
    words = ["--tokenizer", str(GOLDEN / "clip_tiny")]
    run(["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint), *words])
    output = capsys.readouterr().out
    assert "nearest 1   * 1.00" in output and "nearest 2   a 1.00" in output and "vocabulary:" in output
    run(["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint), "--json", "--words", "1"])
    [report] = json.loads(capsys.readouterr().out)
    assert report["concepts"][0]["nearest"][0][0][0] == "#265"


def test_a_tokenizer_folder_with_weights_is_enough(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("a\nb\nc\n")
    save_file({"text_model.embeddings.token_embedding.weight": torch.eye(3)}, tmp_path / "model.safetensors")
    torch.save({"<x>": torch.tensor([0.0, 2.0, 0.0])}, tmp_path / "x.bin")
    run(["inspect", str(tmp_path / "x.bin"), "--tokenizer", str(tmp_path), "--words", "1"])
    assert "nearest 1   b 1.00" in capsys.readouterr().out


def test_the_words_come_from_the_tokenizer_of_the_checkpoint(tmp_path, checkpoint, capsys):
    torch.save({"<x>": vectors(49408, 32, seed=3)[[320]]}, tmp_path / "x.bin")
    command = ["inspect", str(tmp_path / "x.bin"), "--ckpt_path", str(checkpoint)]
    encoder = "cond_stage_config: {target: x.FrozenCLIPEmbedder, params: {version: %s}}"
    for version, word in (
        (GOLDEN / "clip_tiny", "a"),
        ("nobody/nothing", "#320"),
        ("no/such/folder", "#320"),
    ):
        (tmp_path / "config.yaml").write_text("model: {params: {%s}}" % (encoder % version))  # noqa: UP031
        run(command)
        assert f"nearest 1   {word} 1.00" in capsys.readouterr().out
    for damaged in ("[1", "[1]", "a: b", "model: {params: {cond_stage_config: __is_unconditional__}}"):
        (tmp_path / "config.yaml").write_text(damaged)
        run(command)
        assert "nearest 1   #320 1.00" in capsys.readouterr().out


def test_inspect_reports_another_width(cat, checkpoint, capsys):
    run(["inspect", str(cat), "--ckpt_path", str(checkpoint)])
    assert "vocabulary is 32 wide" in capsys.readouterr().out


def test_inspect_as_json_and_a_bad_file_among_good_ones(tmp_path, cat, capsys):
    (tmp_path / "bad.pt").write_text("<html>")
    assert main(["inspect", str(tmp_path / "bad.pt"), str(cat), "--json"]) == 1
    output = capsys.readouterr()
    bad, good = json.loads(output.out)
    assert "web page" in bad["error"] and good["format"] == "a1111"
    assert good["concepts"][0]["width"] == 768 and good["metadata"]["steps"] == 499
    assert output.err.count("\n") == 1 and output.err.startswith("error: ")


@pytest.mark.refused_first
@pytest.mark.parametrize(("reason", "code"), [(errno.ENOSPC, 1), (errno.EPIPE, 0)])
def test_results_that_are_lost_are_no_success(cat, monkeypatch, capsys, reason, code):
    """A reader that has seen enough and closed its pipe is one."""

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(reason, os.strerror(reason))

    stream = io.TextIOWrapper(io.BufferedWriter(console._LastingStream(Full())), "utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", str(cat)]) == code
    said = "error: the results cannot be written: No space left on device; send them elsewhere\n"
    assert capsys.readouterr().err == (said if code else "")


@pytest.mark.refused_first
def test_json_is_valid_in_a_console_of_another_code_page(tmp_path, monkeypatch):
    file = write(learned("caf\u00e9 \U0001f600 \u05e7"), tmp_path / "x.safetensors")
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    run(["inspect", str(file), "--json"])
    stream.flush()
    found = json.loads(stream.buffer.getvalue())
    assert found[0]["concepts"][0]["trigger"] == "caf\u00e9 \U0001f600 \u05e7"


def test_convert(cat, tmp_path, capsys):
    run(["convert", str(cat), "--to", "safetensors", "--trigger", "<my-cat>"])
    assert f"wrote {tmp_path / 'my-cat.safetensors'}" in capsys.readouterr().out
    found = read(tmp_path / "my-cat.safetensors")
    assert found.triggers == ["<my-cat>"] and torch.equal(found.concepts[0].vectors, vectors())
    run(["convert", str(cat), "--to", "original", "-o", str(tmp_path / "sub" / "x.pt")])
    assert read(tmp_path / "sub" / "x.pt").format == "original"


def test_convert_to_an_image_with_a_preview(cat, tmp_path):
    Image.new("RGB", (300, 300), (1, 2, 250)).save(tmp_path / "p.png")
    run(
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
    assert (np.array(open_image(tmp_path / "c.png"))[150, 150] == [1, 2, 250]).all()
    assert read(tmp_path / "c.png").triggers == ["cat"]


def test_convert_overwrites_only_with_the_flag(cat, capsys):
    before = cat.read_bytes()
    assert "--overwrite" in fails(capsys, 1, "convert", cat, "--to", "original")
    assert cat.read_bytes() == before
    run(["convert", str(cat), "--to", "original", "--overwrite"])
    assert read(cat).format == "original"


@pytest.mark.client_files
def test_convert_of_width_1280_needs_the_encoder(tmp_path, capsys):
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "x.safetensors")
    command = ["convert", tmp_path / "x.safetensors", "--to", "safetensors", "-o", tmp_path / "y.safetensors"]
    assert "--encoder bert" in fails(capsys, 1, *command)
    run([*map(str, command), "--encoder", "bert"])
    assert read(tmp_path / "y.safetensors").concepts[0].encoder == "bert"


def test_convert_of_several_triggers(tmp_path, capsys):
    both = GOLDEN / "embeddings_torch_1_10_layout.pt"
    assert "a new name fits one: split the file" in fails(
        capsys, 1, "convert", both, "--to", "a1111", "--trigger", "x"
    )
    run(["convert", str(both), "--to", "a1111", "-o", str(tmp_path)])
    written = {path.name: read(path).triggers for path in (tmp_path / "a1111").iterdir()}
    assert written == {"embedding.pt": ["*"], "embedding-2.pt": ["@"]}


def test_a_word_is_renamed_with_its_negative(tmp_path, capsys):
    pair = tuple(Concept(word, vectors(seed=seed)) for seed, word in enumerate(("*", "*-neg")))
    both = write(LearnedEmbeddings(pair), tmp_path / "both.pt", "original")
    run(["merge", str(both), "-o", str(tmp_path / "a.pt"), "--rename", "*=<dog>"])
    assert "both.pt: '*-neg' is now '<dog>-neg'" in capsys.readouterr().out
    assert read(tmp_path / "a.pt").triggers == ["<dog>", "<dog>-neg"]
    run(["convert", str(both), "--to", "original", "-o", str(tmp_path / "b.pt"), "--trigger", "<dog>"])
    assert read(tmp_path / "b.pt").triggers == ["<dog>", "<dog>-neg"]


def test_merge_and_split(cat, tmp_path, capsys):
    dog = write(learned("cat", seed=1), tmp_path / "dog.safetensors")
    out = tmp_path / "both.pt"
    assert "--rename 'cat=NEW'" in fails(capsys, 1, "merge", cat, dog, "-o", out)
    assert not out.exists()
    run(["merge", str(cat), str(dog), "-o", str(out), "--rename", "cat=<dog>"])
    assert "dog.safetensors: 'cat' is now '<dog>'" in capsys.readouterr().out
    assert read(out).triggers == ["cat", "<dog>"]
    run(["split", str(out), "-o", str(tmp_path / "words"), "--to", "safetensors"])
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == [
        "cat.safetensors",
        "dog.safetensors",
    ]
    assert "cat.safetensors' exists already" in fails(capsys, 1, "split", out, "-o", tmp_path / "words")
    run(["split", str(out), "-o", str(tmp_path / "words"), "--overwrite"])
    run(["merge", str(cat), str(dog), "-o", str(tmp_path / "m"), "--auto_rename", "--to", "diffusers"])
    assert sorted(path.name for path in (tmp_path / "m" / "diffusers").iterdir()) == [
        "cat.safetensors",
        "dog.safetensors",
    ]


@pytest.mark.refused_first
def test_an_empty_word_is_not_left_out(cat, tmp_path, capsys):
    line = fails(capsys, 1, "convert", cat, "--to", "a1111", "--trigger", "", "-o", tmp_path / "x.pt")
    assert "--trigger '' is empty" in line and not (tmp_path / "x.pt").exists()


@pytest.mark.refused_first
@pytest.mark.parametrize("place", ["x" * 300, "cat.pt/x.pt", "."])
def test_a_place_that_cannot_be_written_is_one_line(place, cat, tmp_path, capsys):
    line = fails(capsys, 1, "convert", cat, "--to", "a1111", "-o", tmp_path / place, "--overwrite")
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 308


@pytest.mark.refused_first
def test_mistakes_end_in_one_line(cat, tmp_path, capsys):
    assert fails(capsys, 1, "inspect", tmp_path / "absent.pt").count("\n") == 1
    assert "old=new" in fails(capsys, 2, "merge", cat, "-o", tmp_path / "b", "--rename", "x")
    assert "error: " in fails(capsys, 2, "convert", tmp_path / "a", "--to", "pickle")
    assert "error: " in fails(capsys, 2)


ONE = GOLDEN / "clip_one_vector" / "embeddings.pt"
THREE = GOLDEN / "clip_three_vectors" / "embeddings.pt"


def merge_originals(tmp_path, *arguments: object, code: int = 0) -> None:
    """Run scripts/merge_embeddings.py, which must end with `code`."""
    assert merge_main(["--output_path", str(tmp_path / "out.pt"), *map(str, arguments)]) == code


def test_the_originals_command_line(tmp_path, capsys):
    other = tmp_path / "dog.safetensors"
    save_file({"emb_params": vectors(2, 32)}, other)
    merge_originals(tmp_path, "--manager_ckpts", ONE, other, "-sd")
    content = read(tmp_path / "out.pt")
    assert content.format == "original" and content.triggers == ["*", "dog"]
    assert torch.equal(content.concepts[0].vectors, read(ONE).concepts[0].vectors)
    assert content.concepts[0].token == 265
    assert "'dog': 2 x 32" in capsys.readouterr().out
    merge_originals(tmp_path, "--manager_ckpts", ONE, other, "--config", "any.yaml", "--stable_diffusion")


def test_a_conflict_of_triggers_is_reported_and_nothing_written(tmp_path, capsys):
    merge_originals(tmp_path, "--manager_ckpts", ONE, THREE, code=1)
    assert not (tmp_path / "out.pt").exists()
    error = capsys.readouterr().err
    assert "both have the trigger '*'" in error and error.count("\n") == 1


def test_a_conflict_is_solved_by_renaming(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it must not ask the user"))
    merge_originals(tmp_path, "--manager_ckpts", ONE, THREE, "--rename", "*=@")
    assert [len(c.vectors) for c in read(tmp_path / "out.pt").concepts] == [1, 3]
    assert "'*' is now '@'" in capsys.readouterr().out
    merge_originals(tmp_path, "--manager_ckpts", ONE, THREE, "--auto_rename")
    assert read(tmp_path / "out.pt").triggers == ["*", "<embeddings>"]


def test_bert_for_a_file_that_does_not_name_its_encoder(tmp_path):
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "x.safetensors")
    merge_originals(tmp_path, "--manager_ckpts", tmp_path / "x.safetensors", "--use_bert")
    assert read(tmp_path / "out.pt").concepts[0].encoder == "bert"


def test_a_missing_argument_is_a_usage_error(capsys):
    assert merge_main(["--output_path", "x"]) == 2 and "error: " in capsys.readouterr().err


# -- words for other tools and models ------------------------------------------------------------------------


@pytest.mark.client_files
def test_a_word_without_token_id_is_said_for_the_originals_format(cat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ldm.embeddings.inspection.known_folder", lambda name: None)
    run(["convert", str(cat), "--to", "original", "-o", str(tmp_path / "a.pt")])
    output = capsys.readouterr().out
    assert "'cat': no token id without --tokenizer FOLDER" in output and "the word does nothing" in output
    run(["convert", str(cat), "--to", "original", "-o", str(tmp_path / "b.pt"), "--trigger", "*"])
    run(["convert", str(cat), "--to", "a1111", "-o", str(tmp_path / "c.pt")])
    assert "does nothing" not in capsys.readouterr().out
    merge_originals(tmp_path, "--manager_ckpts", cat)
    assert "'cat': no token id" in capsys.readouterr().out


@pytest.mark.client_files
def test_the_token_id_comes_from_a_tokenizer(tmp_path, capsys, monkeypatch):
    torch.save({"cat": vectors()}, tmp_path / "cat.bin")
    torch.save({"<my-cat>": vectors(seed=1)}, tmp_path / "my-cat.bin")
    (tmp_path / "vocab.json").write_text(json.dumps({"!": 0, "cat": 1, "cat</w>": 2368}))
    tokenizer = ["--tokenizer", str(tmp_path)]
    run(["convert", str(tmp_path / "cat.bin"), "--to", "original", *tokenizer])
    assert "does nothing" not in capsys.readouterr().out
    assert read(tmp_path / "cat.pt").concepts[0].token == 2368
    files = [str(tmp_path / name) for name in ("cat.bin", "my-cat.bin")]
    run(["merge", *files, "-o", str(tmp_path / "both.pt"), *tokenizer])
    assert "'<my-cat>': no single token of the vocabulary" in capsys.readouterr().out
    assert [concept.token for concept in read(tmp_path / "both.pt").concepts] == [2368, None]
    # One that was downloaded before is at hand without being named.
    monkeypatch.setattr("ldm.embeddings.inspection.known_folder", lambda name: tmp_path)
    run(["convert", str(tmp_path / "cat.bin"), "--to", "original", "-o", str(tmp_path / "d.pt")])
    assert read(tmp_path / "d.pt").concepts[0].token == 2368


@pytest.mark.client_files
def test_an_unknown_encoder_is_asked_for_before_it_becomes_bert(tmp_path, capsys):
    save_file({"emb_params": vectors(1, 1280)}, tmp_path / "x.safetensors")
    command = ["convert", tmp_path / "x.safetensors", "--to", "original", "-o", tmp_path / "y.pt"]
    assert "--encoder bert, or clip_g" in fails(capsys, 1, *command)
    assert not (tmp_path / "y.pt").exists()
    merge_originals(tmp_path, "--manager_ckpts", tmp_path / "x.safetensors", code=1)
    assert "--encoder bert, or clip_g" in capsys.readouterr().err
    run([*map(str, command), "--encoder", "clip_g", "--trigger", "*"])
    assert read(tmp_path / "y.pt").concepts[0].encoder == "clip_g"
    assert "clip_l (768), clip_h (1024)" in fails(capsys, 1, *command, "--encoder", "clip-g", "--overwrite")


@pytest.mark.client_files
def test_sdxl_words_in_the_two_files_of_diffusers(tmp_path, capsys):
    save_file({"clip_l": vectors(), "clip_g": vectors(width=1280)}, tmp_path / "my cat.safetensors")
    run(
        [
            "convert",
            str(tmp_path / "my cat.safetensors"),
            "--to",
            "diffusers",
            "-o",
            str(tmp_path / "x.safetensors"),
        ]
    )
    names = [tmp_path / "x.safetensors", tmp_path / "x_2.safetensors"]
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == list(map(str, names))
    assert "x.safetensors' exists already" in fails(
        capsys, 1, "convert", tmp_path / "my cat.safetensors", "--to", "diffusers", "-o", names[0]
    )
    run(["merge", *map(str, names), "--to", "safetensors", "-o", str(tmp_path / "again.safetensors")])
    found = read(tmp_path / "again.safetensors")
    assert torch.equal(found.vectors_for(1280, "clip_g")["my cat"], vectors(width=1280))
    run(["inspect", str(tmp_path / "again.safetensors")])
    output = capsys.readouterr().out
    assert "768 wide" in output and "1280 wide: for the second encoder of SDXL" in output
    run(["split", str(tmp_path / "again.safetensors"), "--to", "diffusers", "-o", str(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "diffusers").iterdir()) == [
        "my_cat.safetensors",
        "my_cat_2.safetensors",
    ]


@pytest.mark.client_files
def test_the_word_that_other_tools_take_is_said(tmp_path, capsys):
    word = write(learned("<my cat>", width=768), tmp_path / "x.safetensors")
    for format in ("safetensors", "a1111"):
        run(["convert", str(word), "--to", format, "-o", str(tmp_path / "out"), "--overwrite"])
        stem = capsys.readouterr().out.strip().rsplit(" ", 1)[1]
        assert stem == "out"
        run(["convert", str(word), "--to", format])
        assert capsys.readouterr().out.strip().endswith("take the file's name as the word: my_cat")
    run(["convert", str(word), "--to", "safetensors", "--trigger", "my-cat"])
    assert "the file's name" not in capsys.readouterr().out
    run(["convert", str(word), "--to", "diffusers", "--trigger", "*"])
    assert "diffusers refuses '*'" in capsys.readouterr().out
