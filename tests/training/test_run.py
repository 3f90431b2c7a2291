"""Whole runs of a tiny model through `main`: results, signals, and resuming."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import main
from ldm import embeddings
from ldm.training import run as run_module
from tests.training.runs import equal, killed_at, only_run, start, state_of

ROOT = Path(main.__file__).parent
# What two states must have in common for their runs to be the same.
PARTS = ("state_dict", "optimizer_states", "random_states", "DataModuleFromConfig", "global_step")


@pytest.mark.client_files
def test_files_of_a_run(tiny_yaml, image_folder, capsys):
    images = "lightning.callbacks.image_logger.params"
    kwargs = f"{images}.log_images_kwargs.ddim_steps=1"
    assert start("--base", tiny_yaml, "-t", "--gpus", "0,", f"{images}.batch_frequency=3", kwargs) == 0
    run = only_run()
    assert run.name.startswith("toy") and run.name.endswith("_tiny")
    word = image_folder.name  # "*" is no name for a file
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    for name in (
        "embeddings.pt",
        "embeddings_gs-4.pt",
        "embeddings_gs-6.pt",
        "last.ckpt",
        f"{word}.safetensors",
        f"{word}_gs-6.safetensors",
    ):
        assert f"checkpoints/{name}" in files
    for name in ("inputs", "reconstruction", "conditioning", "samples", "samples_scaled"):
        assert f"images/train/{name}_gs-000003_e-000000_b-000002.jpg" in files
    assert any(name.startswith("images/val/") for name in files)
    assert sorted(Path(name).name.split("-")[-1] for name in files if name.startswith("configs/")) == [
        "lightning.yaml",
        "project.yaml",
    ]
    assert any(name.startswith("tensorboard/") for name in files) and any(
        n.endswith("metrics.csv") for n in files
    )
    shown = capsys.readouterr()
    assert shown.out.count("no CUDA device here") == (0 if torch.cuda.is_available() else 1)
    assert "learning '*' (1 vector) from 3 images" in shown.out
    assert "learning rate 1.00e-02 = 5.00e-03 x 2 (batch)" in shown.out
    assert f"embeddings: {run}/checkpoints/embeddings.pt" in shown.out
    assert "--prompt 'a photo of *'" in shown.out
    path = (run / "checkpoints" / word).as_posix()
    assert f'pipe.load_textual_inversion("{path}.safetensors", token="<{word}>")' in shown.out
    assert "diffusers refuses words of its vocabulary, such as *" in shown.out
    assert f'copy {word}.safetensors to embeddings/, then the prompt "a photo of {word}"' in shown.out
    assert (
        f'copy {word}.safetensors to models/embeddings/, then the prompt "a photo of embedding:{word}"'
        in shown.out
    )
    assert "on the CPU with precision 32-true" in shown.out or torch.cuda.is_available()
    assert "Traceback" not in shown.err and "error" not in shown.err


def test_only_the_vectors_change_and_are_saved(tiny_yaml, tiny_model, image_folder, monkeypatch):
    models = []
    make = run_module.make_model
    monkeypatch.setattr(
        run_module, "make_model", lambda *given, **by: models.append(make(*given, **by)) or models[0]
    )
    assert start("--base", tiny_yaml, "-t") == 0
    before = load_file(tiny_model)
    after = dict(models[0].named_parameters())
    assert all(torch.equal(after[name].cpu(), value) for name, value in before.items())
    run = only_run()
    state = state_of(run)["state_dict"]
    assert state and all(key.startswith("embedding_manager.") for key in state)
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 100_000
    word = before["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    (learned,) = embeddings.read(run / "checkpoints" / "embeddings.pt").concepts
    assert learned.trigger == "*" and learned.vectors.shape == (1, 32)
    assert not torch.isin(learned.vectors, word).all(), "the vector has changed"
    assert (word - learned.vectors).abs().amax(dim=1).min() < 0.2, (
        "but its initial value is a word of the checkpoint"
    )
    canonical = embeddings.read(run / "checkpoints" / f"{image_folder.name}.safetensors")
    assert torch.equal(canonical.concepts[0].vectors, learned.vectors)
    assert (canonical.metadata.steps, canonical.metadata.seed) == (6, 23)


def test_placeholder_of_the_command_line(tiny_yaml):
    words = ["--placeholder_string", "<my-cat>", "--init_word", "photo of a cat", "--max_steps", "1"]
    assert start("--base", tiny_yaml, "-t", *words) == 0
    (learned,) = embeddings.read(only_run() / "checkpoints" / "embeddings.pt").concepts
    assert learned.trigger == "<my-cat>"
    assert (only_run() / "checkpoints" / "my-cat.safetensors").is_file()


def test_without_t_the_run_is_only_checked(tiny_yaml, capsys):
    assert start("--base", tiny_yaml) == 0
    assert "add -t to train" in capsys.readouterr().out
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ((2, 3, 5), []),
        (
            (4,),
            [
                "data.params.num_workers=1",
                "model.params.personalization_config.params.num_vectors_per_token=2",
                "model.params.personalization_config.params.progressive_words=true",
                "model.params.personalization_config.params.progressive_scale=3",
                "lightning.trainer.accumulate_grad_batches=2",
                "lightning.trainer.limit_val_batches=0",
            ],
        ),
    ],
    ids=["plain", "workers-progressive-accumulated"],
)
def test_resumed_run_equals_the_uninterrupted_run(tiny_yaml, copy_states, steps, options):
    every = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    assert start("--base", tiny_yaml, "-t", every, *options) == 0
    run = only_run()
    uninterrupted = state_of(run)
    assert uninterrupted["global_step"] == 6
    for step in steps:
        killed = killed_at(run, step)
        assert start("-r", killed, "-t") == 0
        resumed = state_of(killed)
        for part in PARTS:
            assert equal(resumed[part], uninterrupted[part]), (step, part)


def test_a_run_with_the_old_file_name_keeps_it(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "--max_steps", 2) == 0
    folder = only_run() / "checkpoints"
    (latest,) = (path for path in folder.glob("*.safetensors") if "_gs-" not in path.name)
    latest.rename(folder / "embedding.safetensors")
    assert start("-r", only_run(), "-t", "--max_steps", 3) == 0
    assert embeddings.read(folder / "embedding.safetensors").metadata.steps == 3 and not latest.exists()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_run_extended_in_any_epoch_equals_the_uninterrupted_run(tiny_yaml, accumulated):
    options = ["-t", f"lightning.trainer.accumulate_grad_batches={accumulated}"]
    assert start("--base", tiny_yaml, *options, "--max_steps", 5, "-l", "whole") == 0
    uninterrupted = state_of("whole")
    assert start("--base", tiny_yaml, *options, "--max_steps", 1, "-l", "extended") == 0
    run = only_run("extended")
    for steps in (2, 5):
        assert start("-r", run, "-t", "--max_steps", steps) == 0
        assert state_of(run)["global_step"] == steps
        assert (run / "checkpoints" / f"embeddings_gs-{steps}.pt").is_file()
    for part in PARTS:
        assert equal(state_of(run)[part], uninterrupted[part]), part


SENDER = '''
import signal
from pytorch_lightning.callbacks import Callback

class Sender(Callback):
    """Sends a signal to its own process in the middle of a step."""

    def __init__(self, name, step):
        self.signum, self.step = signal.Signals[name], step

    def on_before_backward(self, trainer, *rest):
        if trainer.global_step == self.step:
            signal.raise_signal(self.signum)
'''


def sending(name: str, step: int) -> list[str]:
    Path("sender.py").write_text(SENDER)
    sys.modules.pop("sender", None)
    node = "lightning.callbacks.sender"
    return [f"{node}.target=sender.Sender", f"{node}.params.name={name}", f"{node}.params.step={step}"]


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stop_request_waits_for_the_step_and_saves(tiny_yaml, capsys, name, code):
    assert start("--base", tiny_yaml, "-t", *sending(name, 2)) == code
    run = only_run()
    assert state_of(run)["global_step"] == 3
    assert (run / "checkpoints" / "embeddings_gs-3.pt").is_file()
    shown = capsys.readouterr()
    assert f"stopped by {name} at step 3" in shown.out
    assert f"resume with: python main.py -r {run} -t" in shown.out
    assert "Traceback" not in shown.err


def test_stop_request_between_step_and_validation(tiny_yaml, capsys):
    Path("late_sender.py").write_text(SENDER.replace("on_before_backward", "on_train_batch_end"))
    words = [word.replace("sender.Sender", "late_sender.Sender") for word in sending("SIGTERM", 3)]
    assert start("--base", tiny_yaml, "-t", *words) == 143
    assert state_of(only_run())["global_step"] == 3
    assert (only_run() / "checkpoints" / "embeddings_gs-3.pt").is_file()
    assert "resume with" in capsys.readouterr().out


def test_stop_request_ends_a_preview_at_once(tiny_yaml, monkeypatch):
    monkeypatch.setattr(
        "ldm.models.diffusion.ddpm.LatentDiffusion.log_images",
        lambda *args, **kwargs: signal.raise_signal(signal.SIGINT) or pytest.fail("not interrupted"),
    )
    images = "lightning.callbacks.image_logger.params"
    often = [f"{images}.batch_frequency=2", f"{images}.increase_log_steps=false"]
    assert start("--base", tiny_yaml, "-t", *often) == 130
    assert state_of(only_run())["global_step"] == 2


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this platform has no SIGUSR1")
def test_sigusr1_saves_and_continues(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", *sending("SIGUSR1", 1)) == 0
    names = {path.name for path in (only_run() / "checkpoints").iterdir()}
    assert {"embeddings_gs-2.pt", "embeddings_gs-6.pt"} <= names
    assert state_of(only_run())["global_step"] == 6


@pytest.mark.skipif(os.name == "nt", reason="signals of other processes")
def test_sigterm_from_another_process(tiny_yaml):
    command = [sys.executable, str(ROOT / "main.py"), "--base", str(tiny_yaml), "-t", "--max_steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "resume with" in out
    step = state_of(only_run())["global_step"]
    assert step > 0
    assert (only_run() / "checkpoints" / f"embeddings_gs-{step}.pt").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_killed_runs_resume_exactly(tiny_yaml):
    """Ten runs, each killed at a random time and resumed, compared with an uninterrupted run."""
    program = [sys.executable, str(ROOT / "main.py")]
    words = ["--base", str(tiny_yaml), "-t", "--max_steps", "60", "data.params.num_workers=1"]
    words.append("lightning.modelcheckpoint.params.every_n_train_steps=7")
    subprocess.run([*program, *words, "-l", "uninterrupted"], check=True, capture_output=True)
    uninterrupted = state_of(only_run(Path("uninterrupted")))
    for number in range(10):
        folder = Path(f"killed-{number}")
        process = subprocess.Popen([*program, *words, "-l", str(folder)], stdout=subprocess.DEVNULL)
        while not list(folder.glob("*/checkpoints/last.ckpt")):
            time.sleep(0.05)
        time.sleep(random.random() * 2)
        process.kill()
        process.wait()
        subprocess.run([*program, "-r", str(only_run(folder)), "-t"], check=True, capture_output=True)
        resumed = state_of(only_run(folder))
        for part in PARTS:
            assert equal(resumed[part], uninterrupted[part]), (number, part)


def test_saved_yamls_repeat_the_run(tiny_yaml):
    assert start("--base", tiny_yaml, "-t", "--max_steps", 1, "--init_word", "cat") == 0
    saved = OmegaConf.merge(*map(OmegaConf.load, sorted((only_run() / "configs").iterdir())))
    assert saved.model.params.personalization_config.params.initializer_words == ["cat"]
    assert (saved.seed, saved.scale_lr, saved.lightning.trainer.max_steps) == (23, True, 1)
    assert start("--base", *(only_run() / "configs").iterdir(), "-t", "-l", "again") == 0
    first, second = (state_of(only_run(Path(folder)))["state_dict"] for folder in ("logs", "again"))
    assert equal(first, second)
