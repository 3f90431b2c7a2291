from __future__ import annotations

from benchmarks.report import Report
from benchmarks.several_concepts import fill


def test_the_cost_is_per_concept_and_identity_is_paired_with_the_run_of_one() -> None:
    columns = ("concepts", "s", "per concept", "ms", "identity", "difference")
    report = Report("t", "T", columns, {})
    found = {
        1: {"seconds": 20.0, "identity": {"a": 0.8}},
        2: {"seconds": 22.0, "identity": {"a": 0.7, "b": 0.9}},
    }
    fill(report, found, steps=100)
    assert report.rows == [
        ("1", "20.0", "20.0", "200", "0.80", "0.00 (0.00 to 0.00)"),
        ("2", "22.0", "11.0", "220", "0.80", "-0.10 (-0.10 to -0.10)"),
    ]
    assert "| 2 " in report.markdown()
