"""The command lines of scripts/embeddings.py and scripts/merge_embeddings.py."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import console
from ldm.commands import embeddings
from ldm.commands.embeddings import main, merge_main
from ldm.embeddings import FORMATS, Concept, LearnedEmbeddings, read, write
from ldm.embeddings.method_files import MethodFile, write_method_file
from ldm.images import open_image
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


def run(arguments: list[str]) -> None:
    """Run scripts/embeddings.py, which must succeed."""
    assert main(arguments) == 0


def fails(capsys, code: int, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


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
    assert line.endswith("dials: strength=0.8")
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["dials"] == {"strength": 0.8}


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
    assert "split it first" in fails(capsys, 2, "convert", both, "--to", "a1111", "--trigger", "x")
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


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Checkpoints whose token tables are noisy rotations of one another, and one with BERT."""
    source = vectors(600, 32, seed=5)
    rotation = torch.linalg.qr(vectors(48, 32, seed=6))[0].T
    target = 2 * source @ rotation + 0.1 * vectors(600, 48, seed=7)
    tables = {
        "a.safetensors": (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            source,
        ),
        "b.safetensors": ("cond_stage_model.model.token_embedding.weight", target),
        "bert.safetensors": ("cond_stage_model.transformer.token_emb.weight", vectors(600, 64)),
        "none.safetensors": ("model.diffusion_model.out.2.weight", vectors(4, 4)),
    }
    for name, (key, table) in tables.items():
        save_file({key: table}, tmp_path / name)
    return {name.split(".")[0]: tmp_path / name for name in tables}


@pytest.mark.parametrize("name", ["cat-b.safetensors", "cat-b.pt"])
def test_transfer(name, models, tmp_path, capsys):
    learned_word = write(learned("<cat>", count=2, width=32), tmp_path / "cat.safetensors")
    out = tmp_path / name
    command = ["transfer", learned_word, "--from", models["a"], "--to", models["b"], "--out", out]
    run(list(map(str, command)))
    output = capsys.readouterr().out
    [figures] = [line for line in output.splitlines() if "this map" in line]
    ours, nearest, mean = (float(part.split()[-1]) for part in figures.split(","))
    assert ours > 0.9 and ours > nearest + 0.3 and nearest > mean
    assert "60 tokens that were held out" in output and "measured on tokens, not on images" in output
    found = read(out)
    assert found.concepts[0].vectors.shape == (2, 48)
    assert found.metadata.transferred_from == "a.safetensors" and found.metadata.base_model == "b.safetensors"
    assert found.metadata.initializer == "cat" and found.metadata.steps is None
    run(["inspect", str(out)])
    assert "transferred from a.safetensors" in capsys.readouterr().out
    assert "exists already" in fails(capsys, 1, *command)


def test_a_transferred_word_is_a_start_for_training(models, tmp_path, capsys):
    """The back direction gives the width of the small text encoder, whose manager loads it."""
    from ldm.modules.embedding_manager import EmbeddingManager
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder
    from ldm.util import skip_pretrained

    word = write(learned("<cat>", count=2, width=48), tmp_path / "cat.safetensors")
    out = tmp_path / "cat-a.safetensors"
    run(["transfer", str(word), "--from", str(models["b"]), "--to", str(models["a"]), "--out", str(out)])
    with skip_pretrained():
        embedder = FrozenCLIPEmbedder(version=str(GOLDEN / "clip_tiny"))
    manager = EmbeddingManager(embedder, ["<cat>"], num_vectors_per_token=2, embedding_manager_ckpt=out)
    assert torch.equal(manager.vectors("<cat>").detach(), read(out).concepts[0].vectors)


@pytest.mark.refused_first
def test_impossible_transfers_end_in_one_line(models, tmp_path, capsys):
    word = write(learned("<cat>", width=32), tmp_path / "cat.safetensors")

    def refused(source: object, target: object) -> str:
        return fails(
            capsys, 1, "transfer", word, "--from", source, "--to", target, "--out", tmp_path / "o.pt"
        )

    for line, words in (
        (refused(models["a"], models["bert"]), "BERT's vocabulary differs from CLIP's"),
        (refused(models["none"], models["b"]), "has no text encoder; name a checkpoint"),
        (
            refused(models["b"], models["a"]),
            "width 48: name the model that the word was trained on with --from",
        ),
        (refused(tmp_path / "absent", models["b"]), "absent' does not exist; check the path"),
        (refused(models["a"], word), "has no text encoder"),
    ):
        assert words in line and line.count("\n") == 1 and len(line) < 308
    assert not (tmp_path / "o.pt").exists()


class Hub:
    """In place of the hub: a repository of a model in the layout of diffusers, whose downloads write tables."""

    def __init__(self, root: Path, tables: dict[str, torch.Tensor]) -> None:
        self.root, self.tables, self.online = root, tables, True
        self.fetched: list[str] = []

    def snapshot_download(self, repository, revision=None, local_files_only=False, allow_patterns=()):
        folder = self.root / repository.replace("/", "--")
        if local_files_only and not folder.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        for name in allow_patterns:
            self.fetched.append(f"{repository}/{name}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                key = "text_model.embeddings.token_embedding.weight"
                save_file({key: self.tables[repository]}, folder / name)
            elif name == "model_index.json":
                parts = ("unet", "text_encoder", "tokenizer")
                (folder / name).write_text(json.dumps({part: ["x", "y"] for part in parts}))
            else:
                words = {f"w{i}</w>": i for i in range(600)}
                (folder / name).write_text(json.dumps(words))
        return str(folder)

    def model_info(self, repository, revision=None):
        if not self.online or repository not in self.tables:
            raise ConnectionError("Name or service not known")
        names = ["model_index.json", "tokenizer/vocab.json", "unet/diffusion_pytorch_model.safetensors"]
        names += ["text_encoder/config.json", "text_encoder/model.safetensors", "v1-5.ckpt"]
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> Hub:
    tables = {
        f"someone/{name}": next(iter(load_file(models[name]).values())).contiguous() for name in ("a", "b")
    }
    made = Hub(tmp_path / "hub", tables)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.chdir(tmp_path)
    return made


def test_a_transfer_between_models_of_the_hub_fetches_their_text_encoders(models, hub, tmp_path, capsys):
    word = write(learned("<cat>", count=2, width=32), tmp_path / "cat.safetensors")
    for name, source, target in (
        ("here", models["a"], models["b"]),
        ("hub", "someone/a", "someone/b"),
        ("both", models["a"], "someone/b"),
    ):
        command = [
            "transfer",
            word,
            "--from",
            source,
            "--to",
            target,
            "--out",
            tmp_path / f"{name}.safetensors",
        ]
        run(list(map(str, command)))
    here, *others = (read(tmp_path / f"{name}.safetensors") for name in ("here", "hub", "both"))
    for other in others:
        assert torch.equal(other.concepts[0].vectors, here.concepts[0].vectors)
        assert other.metadata.base_model == "b"
    assert hub.fetched.count("someone/b/text_encoder/model.safetensors") == 1
    assert not any("unet" in name or "ckpt" in name for name in hub.fetched)
    hub.online = False  # what was fetched is enough
    run(["inspect", str(tmp_path / "hub.safetensors"), "--ckpt_path", "someone/b", "--words", "1"])
    assert "nearest 1   w" in capsys.readouterr().out


@pytest.mark.refused_first
def test_a_model_that_the_hub_does_not_give_ends_in_one_line(models, hub, tmp_path, capsys):
    word = write(learned("<cat>", width=32), tmp_path / "cat.safetensors")
    out = tmp_path / "out.safetensors"
    for source, said in (
        (
            "someone/else",
            "'someone/else': it is no file or folder here nor readable from the Hugging Face hub",
        ),
        ("https://x.org/a.safetensors", "'https://x.org/a.safetensors' does not exist"),
    ):
        line = fails(capsys, 1, "transfer", word, "--from", source, "--to", models["b"], "--out", out)
        assert said in line and line.count("\n") == 1 and len(line) < 308
    assert "does not exist" in fails(capsys, 1, "inspect", word, "--ckpt_path", "absent.ckpt")
    assert not out.exists()


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
