"""Training images that are encoded once."""

from __future__ import annotations

import logging
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.personalized import PersonalizedBase, Sample
from ldm.models.diffusion.ddpm import LATENT, POSTERIOR
from ldm.training.callbacks import latent_cache
from ldm.training.callbacks.latent_cache import CachedLatents, LatentCache
from ldm.training.data import PositionSampler, SeededDataset
from ldm.util import UserError
from tests.golden_record import Golden


class Images:
    """Three images, each also mirrored."""

    placeholders = ["*"]

    def __init__(self) -> None:
        self.images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.read = 0

    def __len__(self) -> int:
        return 6

    def variants(self) -> list[tuple[int, bool, int]]:
        return [(i, flipped, 0) for i in range(3) for flipped in (False, True)]

    def image(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        self.read += 1
        pixels = self.images[image]
        return pixels.flip(1) if flipped else pixels

    def draw(self, index: int) -> Sample:
        return Sample(index % 3, index % 2 == 1, f"a photo of * {index}")


@pytest.fixture(scope="module", params=["clip_one_vector", "vq_one_vector"])
def model(request):
    return Golden(request.param).model()


def batch(dataset, indices) -> dict:
    items = [dataset[i] for i in indices]
    return {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "caption"} | {
        "caption": [item["caption"] for item in items]
    }


class MaskedImages(Images):
    """The same, and of each image only a part counts."""

    def loss_weight(self, image: int, flipped: bool = False, view: int = 0) -> Tensor:
        weight = torch.zeros(32, 32)
        weight[:, : 4 * (image + 1)] = 1
        return weight.flip(1) if flipped else weight


def test_weights_in_the_loss_are_kept_by_cell_and_mirrored(model) -> None:
    images = MaskedImages()
    cached = LatentCache().cached(model, images, torch.device("cpu"))
    assert "loss_weight" not in LatentCache().cached(model, Images(), torch.device("cpu"))[0]
    items = batch(cached, [0, 1, 5])
    cells = items["loss_weight"].shape[-1]
    assert items["loss_weight"].shape[1:] == items[cached.key].shape[-2:] and cells < 32
    drawn = [images.draw(i).variant for i in (0, 1, 5)]
    pixels = torch.stack([images.loss_weight(*variant) for variant in drawn])
    size = 32 // cells
    expected = pixels.unfold(1, size, size).unfold(2, size, size).mean((-1, -2))
    assert torch.equal(items["loss_weight"], expected)
    direct = {**items, "loss_weight": pixels}
    losses = []
    for one in (items, direct):
        torch.manual_seed(0)
        losses.append(model.shared_step(one)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_cached_latents_equal_encoded_ones(model) -> None:
    images = Images()
    cached = LatentCache(batch_size=4).cached(model, images, torch.device("cpu"))
    assert len(cached) == 6 and cached.placeholders == ["*"] and images.read == 6 + 1, (
        "and one to see the size"
    )
    indices = [0, 1, 5]
    drawn = [images.draw(i) for i in indices]
    stacked = torch.stack([images.image(*d.variant) for d in drawn])
    torch.manual_seed(3)
    expected, captions = model.get_input({"image": stacked, "caption": [d.caption for d in drawn]}, "image")
    torch.manual_seed(3)
    got, got_captions = model.get_input(batch(cached, indices), "image")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got_captions == captions
    assert images.read == 7 + 3


def test_posterior_is_sampled_at_every_step() -> None:
    model = Golden("clip_one_vector").model()
    cached = LatentCache().cached(model, Images(), torch.device("cpu"))
    torch.manual_seed(0)
    draws = torch.stack([model.get_input(batch(cached, [2]), "image")[0] for _ in range(2000)])
    posterior = model.encode_first_stage(Images().image(2).movedim(-1, 0)[None])
    torch.testing.assert_close(draws.mean(0) / model.scale_factor, posterior.mean, atol=0.15, rtol=0.1)
    torch.testing.assert_close(draws.std(0) / model.scale_factor, posterior.std, atol=0.05, rtol=0.1)


def trainer(dataset) -> SimpleNamespace:
    return SimpleNamespace(
        datamodule=SimpleNamespace(datasets={"train": dataset}),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_which_datasets_are_cached() -> None:
    model = Golden("vq_one_vector").model()
    fit = trainer(Images())
    LatentCache().on_fit_start(fit, model)
    assert isinstance(fit.datamodule.datasets["train"], CachedLatents)
    assert fit.datamodule.datasets["train"].key == LATENT
    plain = [1, 2, 3]
    fit = trainer(plain)
    LatentCache().on_fit_start(fit, model)
    assert fit.datamodule.datasets["train"] is plain
    fit = trainer(Images())
    LatentCache().on_fit_start(fit, torch.nn.Identity())
    assert isinstance(fit.datamodule.datasets["train"], Images)


def test_large_cache_is_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model = Golden("clip_one_vector").model()
    in_memory = LatentCache().cached(model, Images(), torch.device("cpu"))
    on_disk = LatentCache(memory_mib=0).cached(model, Images(), torch.device("cpu"))
    assert isinstance(on_disk.encoded, np.memmap) and not isinstance(in_memory.encoded, np.memmap)
    assert torch.equal(on_disk[4][POSTERIOR], in_memory[4][POSTERIOR])


def test_the_memory_limit_counts_bytes_of_float32() -> None:
    cache = LatentCache(memory_mib=1)
    assert not isinstance(cache._allocate((2**18,)), np.memmap)
    assert isinstance(cache._allocate((2**18 + 1,)), np.memmap)


def test_invalid_batch_size() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        LatentCache(batch_size=0)


def test_images_of_different_sizes_are_not_cached() -> None:
    images = Images()
    images.image = lambda image, flipped=False, view=0: torch.zeros(32 + 8 * image, 32, 3)
    model = Golden("clip_one_vector").model()
    assert LatentCache(batch_size=4).cached(model, images, torch.device("cpu")) is images


@pytest.mark.refused_first
def test_a_full_disk_is_named_before_anything_is_encoded(monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"the latents need .* GiB in '.*' \(No space left.*set TMPDIR"):
        LatentCache(memory_mib=0).cached(Golden("clip_one_vector").model(), Images(), torch.device("cpu"))


@pytest.mark.refused_first
def test_encoding_many_images_counts_aloud(monkeypatch, caplog) -> None:
    clock = iter(range(0, 10_000, 11))
    monkeypatch.setattr("ldm.util.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        LatentCache(batch_size=2).cached(Golden("clip_one_vector").model(), Images(), torch.device("cpu"))
    said = [record.message for record in caplog.records]
    assert said[0].startswith("encoded 2 of 6 images, ") and said[0].endswith(" left")
    assert said[-1].startswith("encoded 6 images once")


def concept(folder: Path) -> PersonalizedBase:
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(folder / f"{i}.png")
    return PersonalizedBase(folder, size=32, template_file=None, seed=3)


@pytest.mark.refused_first
def test_a_cached_dataset_can_be_sent_to_a_loader_process(tmp_path) -> None:
    model = Golden("clip_one_vector").model()
    cached = LatentCache().cached(model, concept(tmp_path), torch.device("cpu"))
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sent = ForkingPickler.dumps(SeededDataset(cached, 1))
    if files:
        assert len(os.listdir("/proc/self/fd")) == files, "no image is an open file"
    assert len(sent) < 100_000
    received = pickle.loads(sent)
    for index in (0, 7):
        ours, theirs = cached[index], received[index, 0]
        assert ours["caption"] == theirs["caption"] and torch.equal(ours[POSTERIOR], theirs[POSTERIOR])


@pytest.mark.slow
@pytest.mark.refused_first
def test_spawned_loader_processes_give_the_same_batches(tmp_path) -> None:
    model = Golden("clip_one_vector").model()
    for dataset in (concept(tmp_path), LatentCache().cached(model, concept(tmp_path), torch.device("cpu"))):
        seeded = SeededDataset(dataset, 1)
        batches = {}
        for context in (None, "spawn"):
            loader = DataLoader(
                seeded,
                batch_size=2,
                num_workers=2 if context else 0,
                multiprocessing_context=context,
                sampler=PositionSampler(6, shuffle=False, seed=1),
            )
            batches[context] = list(loader)
        for ours, theirs in zip(batches[None], batches["spawn"], strict=True):
            assert ours.keys() == theirs.keys() and ours["caption"] == theirs["caption"]
            assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "caption")


def test_images_for_previews() -> None:
    cached = LatentCache().cached(Golden("clip_one_vector").model(), Images(), torch.device("cpu"))
    stacked = cached.with_images(batch(cached, [4, 1]), "image")
    assert torch.equal(stacked["image"][0], Images().image(1, False))
    assert torch.equal(stacked["image"][1], Images().image(1, True))


def test_first_stage_stays_on_the_cpu(monkeypatch) -> None:
    """The meta device stands for an accelerator; what is moved there loses its values."""
    freed: list[int] = []
    monkeypatch.setattr(latent_cache, "free_memory", lambda: freed.append(1))
    accelerator = torch.device("meta")
    model = Golden("clip_one_vector").model()
    before = {key: value.clone() for key, value in model.first_stage_model.state_dict().items()}
    fit = trainer(Images())
    cache = LatentCache()
    cache.on_fit_start(fit, model)
    moved: list[object] = []
    model.first_stage_model.to = lambda place: moved.append(place)
    cache.on_train_start(fit, model)
    assert moved == ["cpu"] and freed == [1], "cuDNN takes all memory of a GPU for its first convolutions"
    del model.first_stage_model.to

    resting = model.first_stage_model
    images = torch.zeros(2, 3, 32, 32, device=accelerator)
    assert model.encode_first_stage(images).parameters.device == accelerator
    latents = torch.zeros(2, *model.encode_first_stage(images).mean.shape[1:], device=accelerator)
    assert model.decode_first_stage(latents).device == accelerator
    assert model.first_stage_model is resting
    after = resting.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(KeyError), model.first_stage_on(accelerator) as there:
        assert next(there.parameters()).device == accelerator and model.first_stage_model is there
        raise KeyError
    assert model.first_stage_model is resting


def test_first_stage_stays_without_a_cache() -> None:
    model = Golden("clip_one_vector").model()
    model.first_stage_model.to = lambda place: pytest.fail(f"moved to {place}")
    LatentCache().on_train_start(trainer([1, 2]), model)


@pytest.mark.parametrize("fails", [False, True])
def test_validation_moves_the_first_stage_once(fails: bool) -> None:
    accelerator = torch.device("meta")
    model = Golden("clip_one_vector").model()
    resting = model.first_stage_model
    fit = SimpleNamespace(strategy=SimpleNamespace(root_device=accelerator))
    cache = LatentCache()
    cache.on_validation_start(fit, model)
    there = model.first_stage_model
    assert there is not resting and next(there.parameters()).device == accelerator
    model.encode_first_stage(torch.zeros(1, 3, 32, 32, device=accelerator))
    assert model.first_stage_model is there
    if fails:
        cache.on_exception(fit, model, KeyboardInterrupt())
    else:
        cache.on_validation_end(fit, model)
    assert model.first_stage_model is resting
