from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import several_concepts
from benchmarks.report import Report
from benchmarks.several_concepts import fill


def test_the_cost_is_per_concept_and_identity_is_paired_with_the_runs_of_one() -> None:
    report = Report("t", "T", ("concepts", "runs", "s", "per concept", "ms", "identity", "difference"), {})
    found = {
        1: {"seconds": [20.0, 22.0], "identity": {"a": 0.8, "b": 0.7}},
        2: {"seconds": [22.0], "identity": {"a": 0.7, "b": 0.8}},
    }
    fill(report, found, steps=100)
    assert report.rows == [
        ("1", "2", "21.0", "21.0", "210", "0.75", ""),
        ("2", "1", "22.0", "11.0", "220", "0.75", "0.00 (-0.05 to 0.05)"),
    ]
    assert "| 2 " in report.markdown()


def test_the_same_concepts_in_every_row(monkeypatch, tmp_path, capsys) -> None:
    learned = []

    def train(concepts, steps, folder):
        learned.append([one.name for one in concepts])
        return 1.0, folder / "words.pt"

    monkeypatch.setattr(several_concepts, "train", train)
    monkeypatch.setattr(several_concepts, "score", lambda scorer, file, concept: 0.5)
    monkeypatch.setattr(several_concepts, "load_model_from_config", lambda *files: None)
    words = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--counts", "1", "2", "4"]
    assert several_concepts.main(words) == 0
    names = [one.name for one in several_concepts.creatures(Path("data/concepts"))[:4]]
    assert learned == [[names[0]], [names[1]], [names[2]], [names[3]], names[:2], names[2:], names]
    learned.clear()
    assert several_concepts.main(words) == 0 and learned == [], "finished runs are kept"


@pytest.mark.parametrize("counts", [("2", "3"), ("20",)])
def test_counts_that_do_not_fit_are_one_line(counts, capsys) -> None:
    assert several_concepts.main(["--counts", *counts]) == 1
    assert "must be a multiple of it, and at most 10" in capsys.readouterr().err
