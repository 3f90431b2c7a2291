from __future__ import annotations

from pathlib import Path

from PIL import Image

import main
from ldm.training.callbacks.summary_images import progress_sheet

GREEN, BLUE = (0, 120, 0), (0, 0, 120)


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def previews(folder: Path, steps) -> None:
    for step in steps:
        for name, colour in (("inputs", GREEN), ("samples_scaled", (0, 0, step))):
            Image.new("RGB", (40, 20), colour).save(
                folder / f"{name}_gs-{step:06}_e-000000_b-000001.jpg", quality=100
            )


def test_a_row_for_each_step_beside_its_inputs(tmp_path):
    previews(tmp_path, (200, 50))
    Image.new("RGB", (40, 20)).save(tmp_path / "samples_scaled_gs-000300_e-000000_b-000001.jpg")
    sheet = progress_sheet(tmp_path, rows=12)
    height = sheet.height // 2
    for row, step in enumerate((50, 200)):
        left, right = (sheet.getpixel((x, row * height + 18)) for x in (28, 76))
        assert left[1] > 100 and left[2] < 20
        assert abs(right[2] - step) < 10 and right[1] < 20


def test_many_previews_are_thinned_and_none_is_no_sheet(tmp_path):
    assert progress_sheet(tmp_path / "absent", rows=3) is None
    previews(tmp_path, range(10, 100, 10))
    previews(tmp_path, (5,))
    three = progress_sheet(tmp_path, rows=3)
    assert progress_sheet(tmp_path, rows=12).height > 3 * three.height
    first, last = (three.getpixel((76, y))[2] for y in (18, three.height * 2 // 3 + 18))
    assert abs(first - 5) < 8 and abs(last - 90) < 8


def test_sheets_of_fixed_prompts_stand_for_themselves(tmp_path):
    previews(tmp_path, (50,))
    for step in (100, 200):
        Image.new("RGB", (60, 40), (0, 0, step)).save(
            tmp_path / f"prompts_gs-{step:06}_e-000000_b-000001.jpg"
        )
    sheet = progress_sheet(tmp_path, rows=12)
    assert [round(sheet.getpixel((x, 30))[2], -1) for x in (30, 100)] == [100, 200]


def test_a_run_ends_with_both(tiny_yaml):
    images = "lightning.callbacks.image_logger.params"
    often = [f"{images}.batch_frequency=3", f"{images}.log_images_kwargs.ddim_steps=1"]
    often.append("lightning.callbacks.vector_stats.params.every_n_train_steps=2")
    assert start("--base", tiny_yaml, "-t", *often) == 0
    (run,) = Path("logs").iterdir()
    with Image.open(run / "learning_curve.png") as curve, Image.open(run / "progress.png") as sheet:
        assert curve.height == 3 * 180
        assert sheet.height > sheet.width / 2
    assert start("--base", tiny_yaml, "-t", "-l", "none", "lightning.callbacks.summary_images=null") == 0
    assert not list(Path("none").glob("*/*.png"))
