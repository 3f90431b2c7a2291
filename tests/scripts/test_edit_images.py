"""The strips of the README: what the word that lessens a bias is learned from, and what is counted."""

from __future__ import annotations

from pathlib import Path

from ldm.data.creatures.renderer import render
from ldm.data.creatures.world import SPLITS, creature, scene
from ldm.images import list_images, open_image, to_pil
from scripts.edit_images import patterned_fish, plain


def test_the_judge_counts_the_fish_without_a_pattern(tmp_path: Path) -> None:
    assert plain(fish := [open_image(path) for path in list_images(patterned_fish(tmp_path))]) == 0
    seeds = [SPLITS["concepts"][510 + number] for number in range(3)]
    without = [creature(seed, kind="fish", pattern="plain") for seed in seeds]
    drawn = render(
        without, [scene(seed, one.color, style="photo") for seed, one in zip(seeds, without, strict=True)], 32
    )
    assert len(fish) == 5 and plain([*fish, *(to_pil(image.float() / 127.5 - 1) for image in drawn)]) == 3
