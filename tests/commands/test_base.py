"""Exit codes, errors of one line, and the check of the model."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import save_state_dict
from ldm.commands.base import check_files, guarded, load_latent_diffusion
from ldm.console import Interrupted
from ldm.util import UsageError, UserError
from tests.golden_record import Golden


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (UserError("the seed is red"), 1, "error: the seed is red\n"),
        (UsageError("no such flag"), 2, "error: no such flag\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory; try fewer images at once"),
        (MemoryError(), 1, "error: out of memory; try"),
        (
            OSError(24, "Too many open files"),
            1,
            "error: too many open files; raise the limit with 'ulimit -n",
        ),
        (
            OSError(36, "File name too long", "x" * 5000),
            1,
            "error: 'xxxxxxxxxx",
        ),
        (KeyboardInterrupt(), 130, ""),
        (Interrupted(signal.SIGTERM), 143, ""),
    ],
)
@pytest.mark.refused_first
def test_a_failure_that_the_user_can_fix_has_no_traceback(capsys, error, code: int, output: str) -> None:
    assert guarded(failing(error)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(output) and shown.count("\n") == bool(output) and len(shown) < 308


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="mat1"):
        guarded(failing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_debugging_shows_the_traceback_of_a_user_error(capsys) -> None:
    assert guarded(failing(UserError("the seed is red")), debug=True) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: the seed is red\n")


def test_the_result_of_a_command_is_its_exit_code() -> None:
    assert guarded(lambda: None) == 0 and guarded(lambda: 3) == 3


@pytest.mark.one_reader
@pytest.mark.refused_first
def test_a_missing_file_is_named(tmp_path) -> None:
    check_files(None, __file__)
    with pytest.raises(UserError, match="'gone.pt' does not exist; check the path"):
        check_files(__file__, "gone.pt")
    with pytest.raises(UserError, match="is a folder; name the file in it$"):
        check_files(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "embeddings.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="is a folder; name the file in it, '.*checkpoints/embeddings.pt'"):
        check_files(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe' is not an ordinary file"):
        check_files(tmp_path / "pipe")


def test_a_model_that_cannot_generate_is_named(tmp_path) -> None:
    golden = Golden("clip_one_vector")
    first_stage = OmegaConf.create({"model": golden.config().params.first_stage_config})
    weights = golden.model(load_embeddings=False).first_stage_model.state_dict()
    path = save_state_dict(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="describes AutoencoderKL, which cannot generate images"):
        load_latent_diffusion(first_stage, str(path))
