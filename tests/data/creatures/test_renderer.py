from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.data.creatures.renderer import _centred_pattern, render, render_with_masks, world_version
from ldm.data.creatures.world import HELD_OUT_STYLES, STYLES, creature, scene


def _few(count: int, **fixed: object):
    creatures = [creature(seed) for seed in range(count)]
    return creatures, [scene(c.seed, c.color, **fixed) for c in creatures]


def test_images_and_masks_have_their_shapes_and_do_not_depend_on_the_batch():
    creatures, scenes = _few(40)
    images, masks = render_with_masks(creatures, scenes, 32)
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert masks.shape == (40, 32, 32) and masks.min() >= 0 and masks.max() == 1
    assert torch.equal(render(creatures[35:36], scenes[35:36], 32)[0], images[35])
    assert render(creatures[:2], scenes[:2], 64).shape == (2, 3, 64, 64)


def test_the_creature_is_large_and_shows_its_colour():
    creatures, scenes = _few(64, style="photo")
    images, masks = render_with_masks(creatures, scenes, 32)
    assert (masks.mean((1, 2)) > 0.15).all()
    plain = [i for i, c in enumerate(creatures) if c.pattern == "plain"]
    for i in plain:
        inside = images[i].float()[:, masks[i] == 1].median(1).values / 255
        assert (inside - torch.tensor(creatures[i].rgb)).abs().max() < 0.25


def test_a_plain_background_shows_in_the_upper_corners():
    creatures, scenes = _few(16, style="photo", background="white", rgb=(1.0, 1.0, 1.0), scale=0.7)
    assert (render(creatures, scenes, 32)[:, :, 0, [0, -1]] > 235).all()


@pytest.mark.parametrize("style", [*STYLES[1:], *HELD_OUT_STYLES])
def test_a_style_changes_the_whole_image(style):
    creatures, plain = _few(4, style="photo")
    _, styled = _few(4, style=style)
    change = (render(creatures, plain, 32).float() - render(creatures, styled, 32).float()).abs()
    assert (change.mean((1, 2, 3)) > 8).all()


_LOOKS = {
    (32, 1): [181.66, 150.37, 73.23, 155.13, 71.64, 92.47, 103.07, 127.18, 96.35, 127.38, 165.71, 172.64],
    (64, 3): [181.56, 150.35, 77.32, 156.21, 71.31, 92.18, 102.48, 128.03, 96.53, 129.35, 165.55, 169.40],
}


@pytest.mark.parametrize("size", [32, 64])
def test_the_world_of_this_version_still_looks_the_same(size):
    """A change of what a seed looks like must raise its version, or old caches would be taken for new images."""
    creatures, scenes = _few(12)
    mean = render(creatures, scenes, size).float().mean((1, 2, 3))
    assert torch.allclose(mean, torch.tensor(_LOOKS[size, world_version(size)]), atol=0.5)


def test_stripes_and_spots_differ_on_average_at_64():
    """What the word tells a denoiser as long as noise hides the phase."""
    subject, phases = creature(3, kind="bear", color="red", second_rgb=(1.0, 1.0, 1.0)), 12
    scenes = [scene(3, "red", style="photo", background="blue", rgb=(0.0, 0.0, 1.0))] * phases

    def mean(pattern: str, size: int) -> torch.Tensor:
        builds = [dataclasses.replace(subject.build, pattern_phase=k / phases) for k in range(phases)]
        drawn = [dataclasses.replace(subject, pattern=pattern, build=build) for build in builds]
        return render(drawn, scenes, size).float().mean(0)

    apart = {size: (mean("stripes", size) - mean("spots", size)).square().mean() for size in (32, 64)}
    assert apart[64] > 3 * apart[32]


@pytest.mark.parametrize(("pattern", "share"), [("stripes", 0.62), ("spots", 0.24)])
def test_how_much_of_a_body_a_pattern_covers_at_64(pattern, share):
    y, x = torch.meshgrid(torch.linspace(-20, 20, 800), torch.linspace(-20, 20, 800), indexing="ij")
    assert _centred_pattern(pattern, creature(3).build, x, y).float().mean() == pytest.approx(share, abs=0.01)
