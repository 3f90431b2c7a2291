"""Stable Diffusion XL: sizes beside the text, against numbers recorded from the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ldm.data.personalized import PersonalizedBase
from ldm.generate.embeddings import conditions
from ldm.generate.images import generate
from ldm.models.diffusion.sdxl import LatentDiffusionXL, SizedCaptions
from ldm.modules.methods import DreamArtist
from ldm.training.callbacks.latent_cache import LatentCache
from ldm.util import ConfigError, UserError, instantiate_from_config, skip_pretrained
from tests.golden_record import Golden, fill, sdxl_node

RECORD = Golden("sdxl_tiny")


@pytest.fixture(scope="module")
def model() -> LatentDiffusionXL:
    with skip_pretrained():
        built: Any = fill(instantiate_from_config(sdxl_node()))
    return built


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 2e-4 * expected.abs().max()


def recorded_sizes() -> torch.Tensor:
    return torch.cat([RECORD.io[name] for name in ("original_size", "crop", "target_size")], dim=1)


@torch.no_grad()
def test_condition_and_denoiser_are_the_originals(model) -> None:
    plain = copy.copy(model)
    plain.embedding_manager = None
    captions = SizedCaptions(RECORD.meta["prompts"], recorded_sizes())
    condition = plain.get_learned_conditioning(captions)
    close(condition["c_crossattn"][0], RECORD.io["context"])
    close(condition["c_adm"][0], RECORD.io["vector"])
    close(model.apply_model(RECORD.io["unet_x"], RECORD.io["unet_t"], condition), RECORD.io["unet_out"])


def numbers(condition: dict) -> torch.Tensor:
    """The embedded sizes [B, 6, 16] of a condition."""
    return condition["c_adm"][0][:, 32:].unflatten(1, (6, 16))


@torch.no_grad()
def test_prompts_are_for_a_whole_image_of_the_size_that_is_drawn(model) -> None:
    from ldm.modules.diffusionmodules.util import timestep_embedding

    def told(*sizes: int) -> torch.Tensor:
        return timestep_embedding(torch.tensor(sizes), 16)

    close(numbers(model.get_learned_conditioning(["a dog"]))[0], told(16, 16, 0, 0, 16, 16))
    with model.drawing_at(24, 16, {}):
        close(numbers(model.get_learned_conditioning(["a dog"]))[0], told(24, 16, 0, 0, 24, 16))
    chosen = {"original_size": (512, 300), "crop": (5, 7)}
    with model.drawing_at(24, 16, chosen):
        close(numbers(model.get_unconditional_conditioning(["a dog"]))[0], told(512, 300, 5, 7, 24, 16))
    close(numbers(model.get_learned_conditioning(["a dog"]))[0], told(16, 16, 0, 0, 16, 16))
    with (
        pytest.raises(UserError, match="--crop is -1 0; use two numbers from 0"),
        model.drawing_at(8, 8, {"crop": (-1, 0)}),
    ):
        pass


@torch.no_grad()
def test_an_empty_negative_prompt_is_zero_and_another_one_is_encoded(model) -> None:
    condition = model.get_unconditional_conditioning(["", "a dog"])
    encoded = model.get_learned_conditioning(["", "a dog"])
    for key, width in (("c_crossattn", 64), ("c_adm", 32)):
        zero, kept = condition[key][0][..., :width]
        assert not zero.any()
        close(kept, encoded[key][0][1, ..., :width])
        assert encoded[key][0][0, ..., :width].any()
    assert torch.equal(numbers(condition), numbers(encoded))
    other = copy.copy(model)
    other.zero_empty_negative = False  # as some folders say
    condition = other.get_unconditional_conditioning(["", "a dog"])
    assert all(torch.equal(condition[key][0], encoded[key][0]) for key in encoded)


@torch.no_grad()
def test_weighted_prompts_keep_the_pooled_vector_of_the_first_chunk(model) -> None:
    plain = model.get_learned_conditioning(["a photo of a dog"])
    condition, against = conditions(model, ["a photo of a (dog:1.3)"], "", "a1111")
    assert torch.equal(condition["c_adm"][0], plain["c_adm"][0])
    assert not torch.allclose(condition["c_crossattn"][0], plain["c_crossattn"][0], atol=1e-3)
    for ours, theirs in zip(
        condition["c_crossattn"][0].split(32, -1), plain["c_crossattn"][0].split(32, -1), strict=True
    ):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), rel=1e-3)
    assert not against["c_crossattn"][0].any()
    condition, against = conditions(model, ["a photo of a dog BREAK a cat"], "a painting", "a1111")
    assert condition["c_crossattn"][0].shape == against["c_crossattn"][0].shape == (1, 154, 64)
    assert torch.equal(condition["c_adm"][0], plain["c_adm"][0])


def test_an_image_is_drawn_with_guidance_and_sizes(model) -> None:
    settings: dict[str, Any] = {"steps": 2, "scale": 3.0, "prompt_syntax": "a1111"}
    (first,) = generate(model, "a (dog:1.2)", **settings)
    (other,) = generate(model, "a (dog:1.2)", sizes={"original_size": (512, 512)}, **settings)
    assert first.size == (16, 16) and first.tobytes() != other.tobytes()
    assert "Original size: 512x512" in other.info["parameters"] and "Original" not in first.info["parameters"]
    with pytest.raises(UserError, match="original_size is for Stable Diffusion XL"):
        generate(Golden("clip_one_vector").model(), "a dog", sizes={"original_size": (8, 8)}, **settings)


@pytest.fixture
def dataset(tmp_path) -> PersonalizedBase:
    for number in range(2):
        Image.new("RGB", (40 + 8 * number, 20), (250, 20 * number, 10)).save(tmp_path / f"{number}.png")
    return PersonalizedBase(tmp_path, size=16, flip_p=0.5, zooms=[1.0, 2.0], seed=1, repeats=8)


def test_sizes_of_the_data_are_those_of_its_crops(dataset) -> None:
    assert dataset.sizes(0).tolist() == [20, 40, 0, 8, 16, 16]  # the square of 20 is from 10 to 30
    assert dataset.sizes(1, True).tolist() == [20, 48, 0, 11, 16, 16]
    assert dataset.sizes(1, False, 1).tolist() == [20, 48, 8, 30, 16, 16]  # the square of 10 is from 5, 19
    stretched = PersonalizedBase(dataset.image_paths[0].parent, size=16, center_crop=False)
    assert stretched.sizes(0).tolist() == [20, 40, 0, 0, 16, 16]
    whole = PersonalizedBase(dataset.image_paths[0].parent, crops=3)
    assert [whole.sizes(0, True, view).tolist()[2:] for view in range(3)] == [
        [0, left, 20, 20] for left in (20, 10, 0)
    ]


@torch.no_grad()
def test_a_batch_is_encoded_with_its_sizes_also_from_a_cache(model, dataset) -> None:
    cached = LatentCache().cached(model, dataset, torch.device("cpu"))
    for source in (dataset, cached):
        batch = default_collate([source[index] for index in range(4)])
        _, captions = model.get_input(batch, "image")
        assert isinstance(captions, SizedCaptions)
        expected = torch.stack([dataset.sizes(*dataset.draw(index).variant) for index in range(4)])
        assert torch.equal(captions.sizes, expected)
        assert len(expected.unique(dim=0)) > 1
        same = SizedCaptions(["a dog"] * 4, captions.sizes)  # equal captions are encoded once
        told = numbers(model.get_learned_conditioning(same))
        assert torch.equal(told, numbers(model.get_learned_conditioning(captions)))


def test_dropped_captions_keep_their_sizes(model, dataset, monkeypatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(model, "ucg_rate", 1.0)
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: seen.append(c))
    monkeypatch.setattr(model, "p_losses", lambda *arguments: None)
    batch = default_collate([dataset[index] for index in range(2)])
    model.train().shared_step(batch)
    assert list(seen[0]) == ["", ""] and torch.equal(seen[0].sizes, batch["sizes"])
    assert all(batch["caption"])


def test_a_negative_in_training_has_the_sizes_of_its_image(model, dataset, monkeypatch) -> None:
    seen: list[Any] = []
    words = DreamArtist(model.cond_stage_model, ["*"])
    assert [group["parts"] for group in words.parameter_groups()] == [words.widths] * 2
    monkeypatch.setattr(model, "embedding_manager", words)
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: seen.append(c))
    batch = default_collate([dataset[index] for index in range(2)])
    model.training_condition(model.captions_of(batch))
    assert list(seen[1]) == ["*-neg", "*-neg"] and torch.equal(seen[1].sizes, batch["sizes"])


def test_the_first_stage_computes_in_float32_under_autocast(model) -> None:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model.decode_first_stage(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            model.decode_first_stage(latent.bfloat16()), model.decode_first_stage(latent.bfloat16().float())
        )
        assert torch.equal(model.decode_first_stage(latent), plain)
        image = torch.rand(1, 3, 16, 16)
        assert model.encode_first_stage(image).mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"conditioning_key": "crossattn"}, "conditioning_key is crossattn; use crossattn-adm"),
        (
            {"unet_config": {"params": {"adm_in_channels": 100}}},
            "adm_in_channels is 100; it must be 32, the width",
        ),
        (
            {
                "cond_stage_config": {
                    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                    "params": {"arch": None},
                }
            },
            "cond_stage_config is no ldm.modules.encoders.sdxl",
        ),
    ],
)
def test_mistakes_are_one_line(params, message) -> None:
    described = sdxl_node(**params)
    described["params"]["cond_stage_config"]["params"] = {
        key: value
        for key, value in described["params"]["cond_stage_config"]["params"].items()
        if value is not None
    }
    with skip_pretrained(), pytest.raises(ConfigError, match=message):
        instantiate_from_config(described)
