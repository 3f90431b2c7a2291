"""A tiny text-to-image model with the golden weights, three images, and a YAML that trains on them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ldm.training.callbacks.checkpoint import LastCheckpoint
from tests.golden_record import Golden, golden_state

GOLDEN = Golden("clip_one_vector")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the golden model."""
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(golden_state(GOLDEN.model(load_embeddings=False)), path)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def tiny_yaml(tiny_model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML that trains 6 steps in 2 epochs; the working directory is the test's own."""
    config = OmegaConf.create({"model": GOLDEN.config()})
    dataset = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, "repeats": 2}}
    config.model.base_learning_rate = 5e-3
    config.data = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 2,
            "num_workers": 0,
            "train": dataset,
            "validation": {**dataset, "params": {"size": 32, "set": "val"}},
        },
    }
    config.lightning = {
        "modelcheckpoint": {"params": {"every_n_train_steps": 4}},
        "callbacks": {
            "image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 0, "max_images": 2}}
        },
        "trainer": {"max_steps": 6},
    }
    config.actual_resume = str(tiny_model)
    config.data_root = str(image_folder)
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(config, path)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def copy_states(monkeypatch):
    """Copies the state of every step, as a run that is killed after this step leaves it."""
    save = LastCheckpoint.save_now

    def save_and_copy(self, trainer):
        save(self, trainer)
        copy = self.path.with_name(f"step{trainer.global_step}.ckpt")
        if self.path.exists() and not copy.exists():
            copy.write_bytes(self.path.read_bytes())

    monkeypatch.setattr(LastCheckpoint, "save_now", save_and_copy)


class Line(pl.LightningModule):
    """A minimal model: a line through numbers; `log_images` shows its slope."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.frozen = nn.Dropout().eval()
        self.learning_rate = 0.1
        self.previews = 0

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        return ((self.line(batch["x"]) - 2 * batch["x"] + torch.randn(1)) ** 2).mean()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val/loss", torch.rand(()), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def log_images(self, batch: dict, N: int = 8) -> dict[str, torch.Tensor]:
        self.previews += 1
        assert not self.training
        torch.rand(3)
        return {"slope": self.line.weight.expand(4, 3, 8, 8).detach()}


@pytest.fixture
def line() -> Line:
    torch.manual_seed(0)
    return Line()


class Numbers(torch.utils.data.Dataset):
    """A dataset of the numbers 0, 1, 2, ... under the key x."""

    def __init__(self, length: int = 6) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index)])}


@pytest.fixture
def numbers() -> type[Numbers]:
    return Numbers


@pytest.fixture(autouse=True)
def _as_before():
    """Check signal handlers, and restore log levels and the random state, after each test."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    levels = {
        name: logging.getLogger(name).level for name in ("ldm", "pytorch_lightning", "lightning_fabric")
    }
    state = torch.get_rng_state()
    yield
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for handler in list(logging.getLogger("ldm").handlers):
        logging.getLogger("ldm").removeHandler(handler)
    torch.set_rng_state(state)
