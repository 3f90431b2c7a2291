"""What a run learns: loss and vectors, several concepts, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import main
from ldm import embeddings
from ldm.checkpoint import load_model_from_config
from ldm.data.personalized import PersonalizedBase
from ldm.embeddings import read
from ldm.images import list_images, open_image, to_tensor
from ldm.util import instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill

DRAWS = 64


@torch.no_grad()
def loss(model, image: torch.Tensor) -> float:
    """The mean loss of an image [3, H, W] at fixed timesteps with fixed noise and the model's current vectors."""
    latent = model.get_first_stage_encoding(model.encode_first_stage(image[None]).mode())
    latents = latent.expand(DRAWS, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, model.num_timesteps - 1, DRAWS).long()
    condition = model.get_learned_conditioning(["a photo of a *"] * DRAWS)
    return model.p_losses(latents, condition, t, noise)[0].item()


def test_loss_decreases_and_vectors_change(tiny_yaml, tiny_model, image_folder) -> None:
    words = ["--max_steps", "40", "--train_batch_size", "8", "data.params.train.params.flip_p=0"]
    assert main.main(["--base", str(tiny_yaml), "-t", *words, "lightning.trainer.limit_val_batches=0"]) == 0
    (run,) = Path("logs").iterdir()
    (learned,) = read(run / "checkpoints" / "embeddings.pt").concepts
    model = load_model_from_config(Golden("clip_one_vector").config(), tiny_model)
    images = [to_tensor(open_image(path)) for path in list_images(image_folder)]
    initial, before = model.embedding_manager.export()["*"], [loss(model, image) for image in images]
    model.embedding_manager.take({"*": learned.vectors}, "the run")
    after = [loss(model, image) for image in images]
    assert (learned.vectors - initial).norm() > initial.norm()
    assert all(a < b - 2e-3 for b, a in zip(before, after, strict=True)), (before, after)


A, B = "*", "@"


@pytest.fixture
def model():
    config = Golden("clip_one_vector").config()
    params = config.params.personalization_config.params
    params.placeholder_strings, params.initializer_words = [A, B], ["cat", "dog"]
    with skip_pretrained():
        model = fill(instantiate_from_config(config)).train()
    model.learning_rate = 1e-2
    return model


def samples_of(words: str) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Latents, captions, timesteps and noise of samples; those of a word do not depend on their position."""
    generators = {A: torch.Generator().manual_seed(1), B: torch.Generator().manual_seed(2)}
    drawn = [
        (
            torch.randn(2, 4, 16, 16, generator=generators[word]),
            torch.randint(0, 1000, (1,), generator=generators[word]),
        )
        for word in words
    ]
    pairs = torch.stack([pair for pair, _ in drawn])
    return (
        pairs[:, 0],
        [f"a photo of {word}" for word in words],
        torch.cat([t for _, t in drawn]),
        pairs[:, 1],
    )


def gradients(model, words: str) -> dict[str, Tensor]:
    z, captions, t, noise = samples_of(words)
    z, noise = z[:, : model.channels], noise[:, : model.channels]
    model.zero_grad()
    loss, _ = model.p_losses(z, model.get_learned_conditioning(captions), t, noise=noise)
    loss.backward()
    return {word: model.embedding_manager.vectors(word).grad for word in (A, B)}


def test_gradient_comes_from_the_words_own_samples(model) -> None:
    alone = gradients(model, A + A)[A].clone()
    mixed = gradients(model, A + B + A + B)[A]
    # The loss is the mean over twice as many samples.
    torch.testing.assert_close(mixed * 2, alone, rtol=2e-3, atol=2e-4 * float(alone.abs().max()))


def step(model, optimizer, words: str) -> None:
    """One step through the hooks that Lightning calls."""
    z, captions, _, _ = samples_of(words)
    optimizer.zero_grad()
    loss, _ = model(z[:, : model.channels], captions)
    loss.backward()
    model.on_before_optimizer_step(optimizer)
    optimizer.step()


def test_absent_word_and_its_moments_do_not_change(model, monkeypatch) -> None:
    """With AdamW, weight decay, and momentum from an earlier step."""
    monkeypatch.setattr(type(model), "trainer", type("One", (), {"world_size": 1}))
    torch.manual_seed(0)
    optimizer = model.configure_optimizers()
    step(model, optimizer, A + B)
    manager = model.embedding_manager
    vectors = manager.vectors(B)
    before = vectors.detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[vectors].items()}
    trained_before = manager.vectors(A).detach().clone()
    for _ in range(3):
        step(model, optimizer, A + A)
    assert torch.equal(vectors, before)
    assert all(torch.equal(optimizer.state[vectors][key], value) for key, value in moments.items())
    assert not torch.equal(manager.vectors(A), trained_before)
    step(model, optimizer, B + B)
    assert not torch.equal(vectors, before)


def test_words_of_all_accumulated_batches_are_trained(model, monkeypatch) -> None:
    monkeypatch.setattr(type(model), "trainer", type("One", (), {"world_size": 1}))
    optimizer = model.configure_optimizers()
    for words in (A + A, B + B):
        z, captions, _, _ = samples_of(words)
        model(z[:, : model.channels], captions)[0].backward()
    model.on_before_optimizer_step(optimizer)
    assert all(model.embedding_manager.vectors(word).grad is not None for word in (A, B))


def test_mixed_batches_and_one_file_per_concept(tiny_yaml, tmp_path, image_folder) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 80 * number, np.uint8)).save(other / f"{number}.png")
    words = tmp_path / "two.yaml"
    OmegaConf.save(
        {
            "data_root": {"<a>": str(image_folder), "<b>": str(other)},
            "model": {
                "params": {
                    "personalization_config": {
                        "params": {"placeholder_strings": ["<a>", "<b>"], "initializer_words": ["cat", "dog"]}
                    }
                }
            },
        },
        words,
    )
    assert main.main(["--base", str(tiny_yaml), str(words), "-t", "--max_steps", "3"]) == 0
    (run,) = Path("logs").iterdir()
    for name in ("a", "b"):
        (concept,) = embeddings.read(run / "checkpoints" / f"{name}.safetensors").concepts
        assert concept.trigger == f"<{name}>"
    data = PersonalizedBase({"<a>": image_folder, "<b>": other}, size=32, repeats=2)
    captions = [data[index]["caption"] for index in range(len(data))]
    assert sum("<a>" in caption for caption in captions) == sum("<b>" in caption for caption in captions) == 6


ROOT = Path(main.__file__).parent


# Noise and timesteps depend only on the captions, and posteriors are not sampled: the same in every process.
FIXED = """
import zlib
import torch
from ldm.models.diffusion.ddpm import LatentDiffusion

class Fixed(LatentDiffusion):
    def get_first_stage_encoding(self, encoded):
        return self.scale_factor * encoded.mode()

    def forward(self, x, cond=None):
        drawn = [torch.Generator().manual_seed(zlib.crc32(caption.encode())) for caption in cond]
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in drawn])
        t = torch.cat([torch.randint(0, self.num_timesteps, (1,), generator=g) for g in drawn])
        self.note_captions(cond)
        return self.p_losses(x, self.training_condition(cond), t, noise=noise)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo between processes")
@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("embedding_manager.EmbeddingManager", {}),
        ("methods.DreamArtist", {}),
        ("methods.ProSpect", {"stages": 3}),
        ("methods.XTI", {}),
        ("methods.OutputResidual", {"learn_input": True}),
        ("methods.Grid", {"stages": 3, "residual_layers": True}),
        ("methods.NeTI", {"features": 16, "hidden": 8, "nested_dropout": 0.0}),
    ],
)
def test_two_processes_learn_as_one_with_the_doubled_batch(tiny_yaml, target, params) -> None:
    Path("fixed.py").write_text(FIXED)
    node = {"target": f"ldm.modules.{target}", "params": {"placeholder_strings": ["*"], **params}}
    OmegaConf.save(OmegaConf.create({"model": {"params": {"personalization_config": node}}}), "own.yaml")
    words = ["--base", str(tiny_yaml), "own.yaml", "-t", "--max_steps", "3", "model.target=fixed.Fixed"]
    words += ["data.params.train.params.repeats=4", "lightning.callbacks.deterministic_loss=null"]
    words += [
        "lightning.callbacks.progress=null",
        "lightning.trainer.limit_val_batches=0",
        "--accelerator",
        "cpu",
    ]

    def learned(folder: str, *more: str) -> tuple[torch.Tensor, float]:
        command = [sys.executable, str(ROOT / "main.py"), *words, "-l", folder, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        (run,) = Path(folder).iterdir()
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 3
        vectors = torch.cat([value.flatten() for value in state["state_dict"].values()])
        return vectors, state["optimizer_states"][0]["param_groups"][0]["lr"]

    one, rate = learned("one", "data.params.batch_size=4")
    two, same = learned("two", "data.params.batch_size=2", "--devices", "2")
    assert rate == pytest.approx(same)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    half, _ = learned(
        "half", "data.params.batch_size=2", "--scale_lr", "false", f"model.base_learning_rate={rate}"
    )
    assert not torch.allclose(half, one, rtol=1e-4, atol=1e-5), "the second half of the batch counts"
