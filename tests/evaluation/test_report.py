from __future__ import annotations

from PIL import Image

from ldm.evaluation.report import concept_report, sheet, table, versions


def test_empty_columns_are_left_out_and_missing_cells_stay_empty() -> None:
    rows = [("a", {"x": 0.5, "y": None}), ("b", {"z": 2}), ("c", {"x": 1.0, "z": "so"})]
    lines = table("what", {"x": "ex", "y": "why", "z": "zed"}, rows).splitlines()
    assert lines[0] == "| what | ex | zed |"
    assert lines[2:] == ["| a | 0.5 |  |", "| b |  | 2 |", "| c | 1 | so |"]


def test_likeness_edits_and_styles_have_tables_of_their_own() -> None:
    features = {"features": {"towers": {"clip_i": {"pairwise": 0.25}}}}
    figures = {
        "prompts": {
            "a photo of *": {"identity": 0.75, **features},
            "* on blue": {"asks_for": "background: blue", "group": "plain", "obeyed": 1.0, "both": 0.5},
            "a fox in the style of *": {"style": 0.4, "in_style": 0.0},
        },
        "references": {"redrawn": {"identity": 1.0, **features}},
        "calibration": {"floor": 0.4, "ceiling": 0.8, "itself_taken": 1.0, "others_taken": 0.03},
    }
    text = concept_report("bobo", figures)
    assert text.count("| prompt |") == 3
    assert "| a photo of \\* | 0.75 | 0.25 |" in text and "| redrawn | 1 | 0.25 |" in text
    assert "CLIP-I pairwise, towers" in text and "| background: blue | 1 | 0.5 |" in text
    assert "0.400 (other creatures) and 1 at 0.800" in text and "3% of other creatures" in text


def test_versions_name_the_packages() -> None:
    assert {"python", "torch", "transformers"} <= set(versions())


def test_a_sheet_stacks_rows_with_their_labels() -> None:
    rows = [
        ("learned from", [Image.new("RGB", (8, 8), "red")] * 3),
        ("a photo", [Image.new("RGB", (8, 8), "blue")]),
    ]
    image = sheet(rows, scale=2)
    assert image.width == 3 * 18 + 2
    column = [image.getpixel((5, y)) for y in range(image.height)]
    red, blue = column.index((255, 0, 0)), column.index((0, 0, 255))
    assert red < blue and column.count((255, 0, 0)) == column.count((0, 0, 255)) == 16
    between = image.crop((0, red + 16, image.width, blue)).convert("L")
    assert between.getextrema()[0] < 128
