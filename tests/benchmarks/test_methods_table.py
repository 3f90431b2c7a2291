"""The statistics of the methods table, and that it goes on where it was stopped."""

from __future__ import annotations

import json

import pytest

from benchmarks import methods_table
from benchmarks.methods_table import BASELINE, METHODS, Report, differences, fill, holm, paired, read_cells


def cells(**shifts: float):
    """Cells of 6 creatures and 2 seeds; each method is one vector plus a shift that differs a little by creature."""
    found = {}
    for seed in (0, 1):
        for creature in range(6):
            for name, shift in {BASELINE: 0.0, **shifts}.items():
                value = 0.5 + 0.05 * creature + shift * (1 + 0.1 * creature) + (0.01 * seed)
                figures = {"identity": value, "edits": value, "attributes": value}
                sizes = {"seconds": 10.0, "parameters": 128, "bytes": 1000}
                found[seed, creature, name] = {
                    "creature": creature,
                    "method": name,
                    "seed": seed,
                    **figures,
                    **sizes,
                }
    return found


def test_differences_are_paired_by_creature_and_seed():
    found = cells(better=0.1)
    assert differences(found, "better", "identity") == pytest.approx([0.1 * (1 + 0.1 * k) for k in range(6)])
    del found[0, 3, BASELINE], found[1, 3, BASELINE]
    assert len(differences(found, "better", "identity")) == 5


def test_sign_flips():
    mean, error, p = paired([0.1, 0.2, 0.1, 0.2, 0.1, 0.2])
    assert (mean, p) == (pytest.approx(0.15), 2 / 64) and error > 0
    assert paired([0.1, -0.1, 0.1, -0.1])[2] == 1.0
    assert paired([0.1] * 20)[2] < 1e-3


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_the_report_says_what_is_better_only_where_it_is_shown():
    report = Report("t", "T", methods_table.COLUMNS, {})
    fill(report, cells(better=0.1, worse=-0.1))
    assert [row[0] for row in report.rows] == [BASELINE, "better", "worse"]
    # Four comparisons of six creatures: the smallest p is 4 x 2 / 64.
    assert report.rows[1][5] == "0.125" and "on both axes at p < 0.05: none" in report.notes[2]
    assert report.markdown().count("\n| ") == 5


def test_cells_that_were_cut_off_or_made_with_other_settings_are_measured_again(tmp_path):
    kept = {"seed": 0, "creature": 9001, "method": "xti", "settings": "new"}
    lines = [json.dumps(kept), json.dumps(kept | {"seed": 1, "settings": "old"}), json.dumps(kept)[:20]]
    (tmp_path / "cells.jsonl").write_text("\n".join(lines))
    assert list(read_cells(tmp_path, {"xti": "new"})) == [(0, 9001, "xti")]


def test_every_method_has_its_yamls():
    for name, method in METHODS.items():
        for path in method.yamls:
            assert (methods_table.ROOT / "configs" / path).is_file(), name
        assert method.of is None or method.of in METHODS
