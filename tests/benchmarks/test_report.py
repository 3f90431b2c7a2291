from __future__ import annotations

import json

import pytest

from benchmarks.report import Report, table, verdict


def test_a_report_is_written_as_markdown_and_json(tmp_path):
    report = Report("speed", "How fast", ("loop", "ms"), {"rounds": 3}, notes=["A note."], data={"s": [0.1]})
    report.rows.append(("ours", "1.0"))
    path = report.write(tmp_path / "results")
    text = path.read_text()
    assert text.startswith("# How fast\n\n| loop | ms  |\n| ---- | --- |\n| ours | 1.0 |\n\n- A note.\n")
    assert "rounds 3" in text and "torch 2" in text and f"{report.machine['threads']} threads" in text
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["rows"] == [["ours", "1.0"]] and kept["data"] == {"s": [0.1]}
    assert {"cpu", "cores", "threads", "gpu", "versions", "python", "date", "commit"} <= kept[
        "machine"
    ].keys()
    assert kept["settings"] == {"rounds": 3}


def test_a_row_must_fit_its_table():
    with pytest.raises(ValueError, match="3 cells under 2"):
        table(("a", "b"), [("1", "2", "3")])


def test_a_missed_bar_says_by_how_much():
    assert verdict(3.0, 3.0) == ">= 3: met"
    assert verdict(2.4, 3.0) == ">= 3: missed by 20%"
    assert verdict(5.9, 6, at_most=True) == "<= 6: met"
    assert verdict(9.0, 6, at_most=True) == "<= 6: missed by 50%"
