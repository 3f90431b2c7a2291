"""Mistakes of users through the real command line: one line and an exit code."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import main
from ldm.embeddings import Concept, LearnedEmbeddings, read, write
from ldm.files import CHECKOUT
from tests.training.runs import only_run, start

pytestmark = pytest.mark.refused_first


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--max_steps", "-5"], 2, "max_steps is -5 (--max_steps)"),
        (["--gpuz", "0,"], 2, "did you mean --gpus"),
        (["--gpus", "all"], 2, "not understood"),
        (["--data_root", "nowhere"], 1, "image folder not found: nowhere"),
        (["--actual_resume", "no.ckpt"], 1, "checkpoint 'no.ckpt' does not exist"),
        (["model.params.nonsense=1"], 1, "'nonsense'"),
        (["model.target=ldm.models.nothing.At"], 1, "no module 'ldm.models.nothing'"),
        (["model.base_learning_rate=0"], 1, "base_learning_rate is 0"),
        (["data.params.batch_size=0"], 1, "batch_size is 0"),
        (["--base", "absent.yaml"], 1, "no such YAML: 'absent.yaml'"),
        (
            ["data.params.train.params.placeholder_token=@"],
            1,
            "none of the captions contains the placeholder '*'",
        ),
        (["lightning.trainer.precision=5"], 1, "lightning.trainer.precision is 5; it must be one of 16, 32"),
        (
            ["model.params.first_stage_key=pixels", "--actual_resume", "gone/x"],
            1,
            "hold image, caption, sizes; name one",
        ),
        (["--strategy", "dpp", "--actual_resume", "gone/x"], 1, "invalid strategy name"),
        (["--max_time", "soon"], 1, "not a valid duration"),
        (["--accelerator", "tpu"], 2, "choose one of auto, cpu"),
        (["-r", "nowhere"], 1, "does not exist"),
    ],
)
def test_mistakes(tiny_yaml, capsys, words, code, message):
    assert start("--base", tiny_yaml, "-t", *words) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not Path("logs").exists() or not list(Path("logs").glob("*/checkpoints/*"))


def test_resume_with_another_placeholder(tiny_yaml, capsys):
    assert start("--base", tiny_yaml, "-t", "--max_steps", 1) == 0
    assert start("-r", only_run(), "-t", "--max_steps", 2, "--placeholder_string", "@") == 2
    assert "keeps its placeholder, '*'; '@' is asked for" in capsys.readouterr().err


def test_missing_base(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start("-t") == 2
    message = capsys.readouterr().err
    assert "give a YAML with --base" in message and "--pretrained_model_name_or_path" in message


def test_debug_shows_the_traceback(tiny_yaml, capsys):
    assert start("--base", tiny_yaml, "-t", "--debug", "model.params.nonsense=1") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def files(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with wrong files of all kinds."""
    weights = load_file(tiny_model)
    torch.save({"state_dict": weights}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(tiny_model.read_bytes()[:-100])
    (tmp_path / "none.ckpt").write_bytes(b"")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    save_file({"x.y": torch.ones(1)}, tmp_path / "stranger.safetensors")
    write(LearnedEmbeddings((Concept("*", torch.zeros(1, 768)),)), tmp_path / "wide.pt", "original")
    for folder in ("empty", "text", "pixel", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel" / "dot.png")
    (tmp_path / "broken" / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--actual_resume gone.ckpt", 1, "checkpoint 'gone.ckpt' does not exist"),
        ("--actual_resume cut.ckpt", 1, "checkpoint 'cut.ckpt': it is damaged or cut off"),
        ("--actual_resume cut.safetensors", 1, "checkpoint 'cut.safetensors' is truncated"),
        ("--actual_resume none.ckpt", 1, "checkpoint 'none.ckpt' is empty"),
        ("--actual_resume page.ckpt", 1, "checkpoint 'page.ckpt' is a web page"),
        ("--actual_resume stranger.safetensors", 1, "use the config that belongs to it"),
        ("--actual_resume wide.pt", 1, "is a textual inversion embedding"),
        ("--actual_resume .", 1, "is a folder"),
        ("model.params.unet_config.params.model_channels=64", 1, "does not fit the config"),
        ("model.params.unet_config.params.chanel_mult=[1]", 1, "did you mean 'channel_mult'?"),
        ("lightning.trainer.max_step=3", 1, "lightning.trainer: unknown key 'max_step'"),
        ("data.params.train.target=ldm.data.personalised.PersonalizedBase", 1, "there is no module"),
        (
            "model.params.personalization_config.target=ldm.modules.embedding_manager.Manager",
            1,
            "no 'Manager'",
        ),
        ("--data_root empty", 1, "no images in empty: it is empty"),
        ("--data_root text", 1, "no images in text: it holds notes.txt"),
        ("--data_root pixel", 1, "dot.png is 1x1 pixels"),
        ("--data_root broken", 1, "half.png"),
        (
            "data.params.train.params.placeholder_token=@",
            1,
            "none of the captions contains the placeholder '*'",
        ),
        ("--embedding_manager_ckpt wide.pt", 1, "this model's text encoder has width 32"),
        ("--embedding_manager_ckpt page.ckpt", 1, "is a web page"),
        ("--max_steps -5", 2, "max_steps is -5 (--max_steps)"),
        ("--max_steps -5 --actual_resume gone.ckpt", 2, "max_steps is -5"),  # before any weight is read
        ("model.base_learning_rate=0 --actual_resume gone.ckpt", 1, "base_learning_rate is 0"),
        ("--max_train_steps -5", 2, "'-5' is not a positive whole number"),
        ("lightning.trainer.max_steps=-5", 1, "max_steps is -5"),
        ("--train_batch_size 0", 2, "'0' is not a positive whole number"),
        ("model.params.personalization_config.params.initializer_words[7]=cat", 1, "does not fit the YAML"),
        ("data.params.train=[1]", 1, "data.params.train is a list where a mapping is needed"),
    ],
)
def test_wrong_files_and_keys(tiny_yaml, files, capsys, words: str, code: int, message: str) -> None:
    assert main.main(["--base", str(tiny_yaml), "-t", *words.split()]) == code
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not Path("logs").exists()


def test_text_file_among_the_images_is_skipped(tiny_yaml, tmp_path, capsys) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    (folder / "notes.md").write_text("where it was taken")
    assert main.main(["--base", str(tiny_yaml), "-t", "--max_steps", "1", "--data_root", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "learning '*' (1 vector) from 1 image" in shown.out
    skipped = [line for line in shown.out.splitlines() if "notes.md" in line]
    assert set(skipped) == {f"{folder}: skipped entries that are not images: notes.md"}
    assert "Traceback" not in shown.err


def test_validation_interval_beyond_an_epoch(tiny_yaml, files, capsys) -> None:
    words = ["lightning.trainer.val_check_interval=5000", "lightning.trainer.limit_val_batches=1"]
    code = main.main(["--base", str(tiny_yaml), "-t", "--max_steps", "2", *words])
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert code == 1 and len(lines) == 1, shown.err
    assert "val_check_interval is 5000, more than the" in lines[0]


def test_a_word_for_each_image_is_learned_in_a_console_without_its_letters(tiny_yaml, monkeypatch) -> None:
    """configs/personalization/per_image_tokens.yaml has Hebrew letters as words, which messages name."""
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict") for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    overlay = CHECKOUT / "configs" / "personalization" / "per_image_tokens.yaml"
    assert start("--base", tiny_yaml, overlay, "-t", "--max_steps", 1) == 0
    streams["stdout"].flush()
    assert b"\\u05d0" in streams["stdout"].buffer.getvalue()
    checkpoints = only_run() / "checkpoints"
    assert "\u05d0" in read(checkpoints / "embeddings.pt").triggers
