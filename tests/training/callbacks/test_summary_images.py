"""Learning curve and progress sheet."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.training.callbacks.summary_images import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Curve,
    draw_curves,
    progress_sheet,
)
from tests.training.runs import start

LINE_BLUE, RED = (31, 95, 168), (192, 57, 43)


def pixels_of(image, colour) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=-1))
    return rows, columns


def test_line_and_mark() -> None:
    image = draw_curves([Curve("loss", [0, 50, 100], [3.0, 2.0, 1.0])], mark=50)
    assert image.size == (WIDTH, HEIGHT)
    rows, columns = pixels_of(image, LINE_BLUE)
    assert rows[columns == columns.min()].mean() < rows[columns == columns.max()].mean()
    assert columns.min() <= LEFT + 2 and columns.max() >= WIDTH - RIGHT - 2
    _, marked = pixels_of(image, RED)
    assert abs(marked.mean() - (LEFT + WIDTH - RIGHT) / 2) < 2


def test_panels_and_unusual_values() -> None:
    curves = [
        Curve("flat", [0, 10], [1.0, 1.0]),
        Curve("gap", [0, 5, 10], [1.0, math.nan, math.inf]),
        Curve("zero", [5], [0.0]),
        Curve("empty", [], []),
    ]
    image = draw_curves(curves)
    assert image.size == (WIDTH, 4 * HEIGHT)
    rows, _ = pixels_of(image, LINE_BLUE)
    assert {int(row) // HEIGHT for row in rows} == {0, 1, 2}


GREEN, BLUE = (0, 120, 0), (0, 0, 120)


def previews(folder: Path, steps) -> None:
    for step in steps:
        for name, colour in (("inputs", GREEN), ("samples_scaled", (0, 0, step))):
            Image.new("RGB", (40, 20), colour).save(
                folder / f"{name}_gs-{step:06}_e-000000_b-000001.jpg", quality=100
            )


def test_one_row_per_step(tmp_path):
    previews(tmp_path, (200, 50))
    Image.new("RGB", (40, 20)).save(tmp_path / "samples_scaled_gs-000300_e-000000_b-000001.jpg")
    sheet = progress_sheet(tmp_path, rows=12)
    height = sheet.height // 2
    for row, step in enumerate((50, 200)):
        left, right = (sheet.getpixel((x, row * height + 18)) for x in (28, 76))
        assert left[1] > 100 and left[2] < 20
        assert abs(right[2] - step) < 10 and right[1] < 20


def test_number_of_rows(tmp_path):
    assert progress_sheet(tmp_path / "absent", rows=3) is None
    previews(tmp_path, range(10, 100, 10))
    previews(tmp_path, (5,))
    three = progress_sheet(tmp_path, rows=3)
    assert progress_sheet(tmp_path, rows=12).height > 3 * three.height
    first, last = (three.getpixel((76, y))[2] for y in (18, three.height * 2 // 3 + 18))
    assert abs(first - 5) < 8 and abs(last - 90) < 8


def test_sheets_of_fixed_prompts(tmp_path):
    previews(tmp_path, (50,))
    for step in (100, 200):
        Image.new("RGB", (60, 40), (0, 0, step)).save(
            tmp_path / f"prompts_gs-{step:06}_e-000000_b-000001.jpg"
        )
    sheet = progress_sheet(tmp_path, rows=12)
    assert [round(sheet.getpixel((x, 30))[2], -1) for x in (30, 100)] == [100, 200]


def test_run_writes_both_images(tiny_yaml):
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
