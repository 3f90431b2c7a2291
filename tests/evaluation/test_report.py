from __future__ import annotations

from ldm.evaluation.report import concept_report, table, versions


def test_columns_nobody_has_are_left_out_and_gaps_stay_empty() -> None:
    rows = [("a", {"x": 0.5, "y": None}), ("b", {"z": 2}), ("c", {"x": 1.0, "z": "so"})]
    lines = table("what", {"x": "ex", "y": "why", "z": "zed"}, rows).splitlines()
    assert lines[0] == "| what | ex | zed |"
    assert lines[2:] == ["| a | 0.5 |  |", "| b |  | 2 |", "| c | 1 | so |"]


def test_a_concepts_tables_keep_likeness_edits_and_styles_apart() -> None:
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


def test_versions_name_what_figures_depend_on() -> None:
    assert {"python", "torch", "transformers"} <= set(versions())
