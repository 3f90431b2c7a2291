"""The embedding files of a run: metadata and formats."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import main
from ldm import embeddings
from ldm.files import images_fingerprint
from ldm.training.callbacks.embedding_saver import EmbeddingSaver
from ldm.util import UserError
from tests.golden_record import Golden


def checkpoints(*words: object) -> Path:
    """Run 2 steps and return the checkpoints folder."""
    assert main.main([str(word) for word in ("--max_steps", 2, "-t", "--base", *words)]) == 0
    (run,) = Path("logs").iterdir()
    return run / "checkpoints"


def test_metadata(tiny_yaml, tiny_model, image_folder) -> None:
    folder = checkpoints(tiny_yaml, "--init_word", "photo", "--scale_lr", "false")
    for suffix in ("", "_gs-2"):
        metadata = embeddings.read(folder / f"{image_folder.name}{suffix}.safetensors").metadata
        assert (metadata.base_model, metadata.steps, metadata.seed) == ("model.safetensors", 2, 23)
        assert metadata.base_model_hash == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
        assert (metadata.images, metadata.resolution, metadata.initializer) == (3, 32, "photo")
        assert metadata.images_fingerprint == images_fingerprint(sorted(image_folder.iterdir()))
        assert metadata.learning_rate == pytest.approx(5e-3)


def test_each_word_of_several_states_its_own_initializer(tiny_yaml) -> None:
    params = "model.params.personalization_config.params"
    words = (f"{params}.placeholder_strings=[<a>,<b>]", f"{params}.initializer_words=[photo,painting]")
    folder = checkpoints(tiny_yaml, *words)
    for stem, word, began in (("a", "<a>", "photo"), ("b", "<b>", "painting")):
        learned = embeddings.read(folder / f"{stem}.safetensors")
        assert learned.metadata.initializer == began and learned.initializers == {word: began}


def test_formats(tiny_yaml) -> None:
    config = OmegaConf.load(tiny_yaml)
    config.lightning.callbacks.embedding_saver = {"params": {"formats": ["a1111", "a1111-png", "diffusers"]}}
    OmegaConf.save(config, tiny_yaml)
    folder = checkpoints(tiny_yaml, "--placeholder_string", "<my-cat>")
    learned = embeddings.read(folder / "embeddings.pt").concepts[0].vectors
    for suffix in ("", "_gs-2"):
        for name in ("{}.safetensors", "a1111/{}.pt", "a1111-png/{}.png", "diffusers/{}.safetensors"):
            (concept,) = embeddings.read(folder / name.format(f"my-cat{suffix}")).concepts
            assert torch.equal(concept.vectors, learned), name
            assert concept.trigger == "<my-cat>"


def test_formats_that_cannot_hold_a_method_are_said_to_be_left_out(tiny_yaml, caplog) -> None:
    formats = "lightning.callbacks.embedding_saver.params.formats=[a1111,safetensors]"
    target = "model.params.personalization_config.target=ldm.modules.methods.ProSpect"
    folder = checkpoints(tiny_yaml, target, formats, "--placeholder_string", "<my-cat>")
    assert "the formats a1111 are left out: words of 'prospect' are more than vectors" in caplog.text
    assert not (folder / "a1111").exists() and (folder / "my-cat.safetensors").is_file()


def test_files_of_early_steps_are_removed_on_request(tiny_yaml) -> None:
    folder = checkpoints(
        tiny_yaml,
        "--save_steps",
        1,
        "--max_steps",
        5,
        "--checkpoints_total_limit",
        2,
        "lightning.callbacks.embedding_saver.params.formats=[a1111]",
        "--placeholder_string",
        "cat",
    )
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*_gs-*")}
    assert names == {
        f"{name}_gs-{step}{suffix}"
        for step in (4, 5)
        for name, suffix in (("embeddings", ".pt"), ("cat", ".safetensors"), ("a1111/cat", ".pt"))
    }
    assert {"embeddings.pt", "cat.safetensors", "last.ckpt"} <= {p.name for p in folder.iterdir()}
    with pytest.raises(UserError, match="keep is 0"):
        EmbeddingSaver(keep=0)


def test_an_exception_before_the_first_step_of_a_resumed_run_writes_no_file(monkeypatch) -> None:
    model = Golden("clip_one_vector").model()
    trainer = SimpleNamespace(global_step=2, is_global_zero=True, lightning_module=model)
    saver, saved = EmbeddingSaver(), []
    monkeypatch.setattr(saver, "save_as", lambda trainer, suffix, step: saved.append(suffix))
    saver.on_train_start(trainer, model)
    saver.on_exception(trainer, model, KeyboardInterrupt())
    assert saved == []
    trainer.global_step = 3
    saver.on_exception(trainer, model, KeyboardInterrupt())
    assert saved == ["_gs-3", ""]


def test_default_format_is_always_written() -> None:
    assert EmbeddingSaver().formats == ["safetensors"]
    assert EmbeddingSaver(formats=["onetrainer", "safetensors"]).formats == ["safetensors", "onetrainer"]


def test_metadata_without_unreadable_files(tiny_yaml, tiny_model, image_folder, tmp_path, caplog) -> None:
    mine = shutil.copy(tiny_model, tmp_path / "mine.safetensors")
    shutil.copytree(image_folder, tmp_path / "mine")
    config = OmegaConf.load(tiny_yaml)
    config.actual_resume, config.data_root = str(mine), str(tmp_path / "mine")
    OmegaConf.save(config, tiny_yaml)

    def gone(*args: object) -> None:
        mine.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingSaver, "on_train_start", lambda self, *rest: gone())
        folder = checkpoints(tiny_yaml)
    metadata = embeddings.read(folder / "mine.safetensors").metadata
    assert (metadata.base_model, metadata.steps, metadata.images) == ("mine.safetensors", 2, 3)
    assert metadata.base_model_hash is None and metadata.images_fingerprint is None


def test_conversion_to_the_original_format(tiny_yaml, tmp_path) -> None:
    """The original finds a placeholder by the tokenizer's id, which only the run knows."""
    folder = checkpoints(tiny_yaml, "--placeholder_string", "sculpture", "--init_word", "photo")
    (first,) = embeddings.read(folder / "embeddings.pt").concepts
    canonical = embeddings.read(folder / "sculpture.safetensors")
    (again,) = embeddings.read(embeddings.write(canonical, tmp_path / "again.pt", "original")).concepts
    assert again.token == first.token is not None
    assert torch.equal(again.vectors, first.vectors)
