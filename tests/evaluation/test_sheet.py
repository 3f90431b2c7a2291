from __future__ import annotations

from PIL import Image

from ldm.evaluation.report import sheet


def test_rows_stand_below_each_other_with_their_labels() -> None:
    rows = [
        ("learned from", [Image.new("RGB", (8, 8), "red")] * 3),
        ("a photo", [Image.new("RGB", (8, 8), "blue")]),
    ]
    picture = sheet(rows, scale=2)
    assert picture.width == 3 * 18 + 2
    column = [picture.getpixel((5, y)) for y in range(picture.height)]
    red, blue = column.index((255, 0, 0)), column.index((0, 0, 255))
    assert red < blue and column.count((255, 0, 0)) == column.count((0, 0, 255)) == 16
    between = picture.crop((0, red + 16, picture.width, blue)).convert("L")
    assert between.getextrema()[0] < 128
