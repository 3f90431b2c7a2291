"""The statistics of the methods table, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import methods_table
from benchmarks.methods_table import (
    BASELINE,
    METHODS,
    Report,
    differences,
    draw_dial,
    fill,
    main,
    read_cells,
)
from benchmarks.rounds import holm, paired
from benchmarks.runs import add_cell, lines_of, reported
from ldm.data.creatures import world
from ldm.evaluation.edits import edits_of
from ldm.util import UserError


def cells(**shifts: float):
    """Cells of 6 creatures and 2 seeds; each method is one vector plus a shift that differs a little by creature."""
    found = {}
    for seed in (0, 1):
        for creature in range(6):
            for name, shift in {BASELINE: 0.0, **shifts}.items():
                value = 0.5 + 0.05 * creature + shift * (1 + 0.1 * creature) + (0.01 * seed)
                figures = {"identity": value, "edits": value, "attributes": value}
                sizes = {"seconds": 10.0, "wall": 12.0, "parameters": 128, "bytes": 1000}
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
    assert report.rows[1][6] == "0.125" and "on both axes at p < 0.05: none" in report.notes[2]
    assert report.rows[1][10] == "1.00"
    assert report.markdown().count("\n| ") == 5


def test_references_and_dials_are_not_compared():
    found = cells(prospect=0.1, words=0.2, first_stage=0.3, **{"neti truncation=32": 0.2})
    for (_, creature, name), cell in found.items():
        base = {"first_stage": 0.8, "prospect": 0.77, "neti truncation=32": 0.78}.get(name, 0.5)
        cell["identity"] = base + 0.01 * creature
        cell["edits"] = None if name == "first_stage" else 0.96
    report = Report("t", "T", methods_table.COLUMNS, {})
    fill(report, found)
    assert [row[0] for row in report.rows] == [BASELINE, "prospect", "words", "first_stage"]
    assert report.rows[2][5:9] == ["", "", "", ""] and report.rows[3][4] == "", "no edits of renderings"
    assert "corrected for 2 comparisons" in report.notes[1]
    assert report.notes[3].endswith("edits of at least 0.95: prospect, neti truncation=32 (first seed)")
    share = np.mean([(0.77 + 0.01 * k) / (0.8 + 0.01 * k) for k in range(6)])
    assert report.rows[1][2] == f"{share:.3f}"


def test_a_dial_is_a_curve(tmp_path, capsys):
    found = cells(neti=0.1, **{"neti truncation=32": 0.05, "neti truncation=0": -0.2})
    draw_dial("neti", found, tmp_path)
    draw_dial("prospect_residual", found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"methods_dial_neti.{suffix}" for suffix in ("json", "md", "png")
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "methods_dial_neti.md").read_text().splitlines()[4:7]
    ]
    assert [row[0] for row in rows] == ["0", "32", "128"]
    assert [row[3] for row in rows] == ["6"] * 3, "of one seed, as other settings of a dial are measured"
    whole = np.mean([found[0, creature, "neti"]["identity"] for creature in range(6)])
    assert rows[2][1] == f"{whole:.3f}"


def test_cells_that_were_cut_off_or_made_with_other_settings_are_measured_again(tmp_path):
    kept = {"seed": 0, "creature": 9001, "method": "xti", "settings": "new"}
    lines = [json.dumps(kept), json.dumps(kept | {"seed": 1, "settings": "old"}), json.dumps(kept)[:20]]
    (tmp_path / "cells.jsonl").write_text("\n".join(lines))
    assert list(read_cells(lines_of(tmp_path), {"xti": "new"})) == [(0, 9001, "xti")]
    add_cell(tmp_path, kept | {"seed": 2})
    add_cell(tmp_path, kept | {"seed": 3})
    assert [seed for seed, _, _ in read_cells(lines_of(tmp_path), {"xti": "new"})] == [0, 2, 3]


def test_a_table_goes_on_from_its_report(tmp_path, monkeypatch):
    """The work folder is not kept in the repository; the JSON of the report is."""
    seen = []
    monkeypatch.setattr(methods_table, "table", seen.append)
    assert main(["--work", str(tmp_path / "work"), "--out", str(tmp_path), "--creatures", "2"]) == 0
    bench = methods_table.Bench(seen[0], {BASELINE: METHODS[BASELINE]})
    cell = {"seed": 0, "creature": 9001, "method": BASELINE, "settings": bench.settings[BASELINE]}
    assert bench.cells() == {} and reported(tmp_path / "methods_table.json") == []
    report = Report("methods_table", "Methods", (), {})
    report.data = {"cells": [cell, cell | {"creature": 9002, "settings": "old"}]}
    report.write(tmp_path)
    assert list(bench.cells()) == [(0, 9001, BASELINE)]
    bench.options.tuning = True
    assert bench.cells() == {}, "creatures that are tuned on have a report of their own"


def test_what_is_learned_again_and_what_is_only_scored_again(monkeypatch):
    def digests(*words):
        bench = methods_table.Bench(made(*words), {"neti": METHODS["neti"]})
        return bench._digest_of_words(METHODS["neti"]), bench.settings["neti"]

    def made(*words):
        seen = []
        monkeypatch.setattr(methods_table, "table", seen.append)
        assert main(list(words)) == 0
        return seen[0]

    words, scores = digests()
    assert digests("--samples", "4")[0] == words and digests("--samples", "4")[1] != scores
    assert digests("--steps", "4")[0] != words and digests("--steps", "4")[1] != scores


def test_every_method_has_its_yamls():
    for name, method in METHODS.items():
        for path in method.yamls:
            assert (methods_table.ROOT / "configs" / path).is_file(), name
        assert method.of is None or METHODS[method.of].yamls


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs of the command whose cells are made up; what was measured, in order."""
    seen = []

    def cell(bench, seed, index, name):
        seen.append((seed, index, name))
        if name == "grid":
            raise UserError("grid on creature failed: no memory")
        found = {
            "seed": seed,
            "creature": index,
            "method": name,
            "settings": bench.settings[name],
            "whole": 36.0,
        }
        figures = {"identity": 0.8, "attributes": 0.9, "edits": 0.9}
        return found | figures | {"seconds": 30.0, "wall": 20.0, "parameters": 128, "bytes": 1000}

    monkeypatch.setattr(methods_table.Bench, "_measured", cell)

    def run(*words):
        seen.clear()
        code = main(["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--creatures", "2", *words])
        return code, list(seen)

    return run


def test_it_goes_on_where_it_was_stopped(measured, monkeypatch, capsys, tmp_path):
    methods = ("--methods", BASELINE, "xti", "words")
    clock = iter([0.0, *[100.0] * 4, 4000.0, 4000.0])
    monkeypatch.setattr(methods_table.time, "monotonic", lambda: next(clock))
    code, seen = measured(*methods, "--hours", "1")
    assert code == 0 and seen == [
        (0, 9001, BASELINE),
        (0, 9001, "xti"),
        (0, 9001, "words"),
        (0, 9002, BASELINE),
    ]
    assert "the hours are over" in capsys.readouterr().out
    assert measured(*methods, "--estimate") == (0, [])
    # One cell of words is missing and one of xti, and three of the second seed, which words do not have.
    assert "6 cells are missing, about 0.1 hours" in capsys.readouterr().out
    monkeypatch.undo()


def test_a_run_that_fails_does_not_stop_the_others(measured, capsys):
    code, seen = measured("--methods", BASELINE, "grid", "xti", "--seeds", "1")
    assert code == 0 and len(seen) == 6 and capsys.readouterr().out.count("not measured: grid") == 2


def test_all_cells_and_none_again(measured, tmp_path):
    methods = ("--methods", BASELINE, "xti", "--seeds", "1")
    assert len(measured(*methods)[1]) == 4
    assert measured(*methods) == (0, [])
    assert (tmp_path / "out" / "methods_chosen.md").is_file()
    assert not (tmp_path / "out" / "methods_table.md").is_file(), "which corrects for all methods"


def test_means_are_over_creatures_that_all_methods_have(measured, tmp_path, monkeypatch):
    clock = iter([0.0, *[100.0] * 3, 4000.0, 4000.0])
    monkeypatch.setattr(methods_table.time, "monotonic", lambda: next(clock))
    measured("--methods", BASELINE, "xti", "--hours", "1")
    monkeypatch.undo()
    text = (tmp_path / "out" / "methods_chosen.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(f"| {BASELINE} ")]
    assert rows[0].split("|")[-2].strip() == "1" and "left out are 1 cells" in text


def test_what_is_tuned_has_its_own_creatures(measured, tmp_path):
    variant = ("--variant", "slow=xti model.base_learning_rate=1e-3")
    _, seen = measured("--tuning", "--seeds", "1", "--methods", BASELINE, *variant)
    assert seen == [(0, 100, BASELINE), (0, 100, "slow"), (0, 101, BASELINE), (0, 101, "slow")]
    text = (tmp_path / "out" / "methods_tuning.md").read_text()
    assert "slow" in text and "variant slow=xti model.base_learning_rate=1e-3" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variant", "a=xti x=1"), "--variant needs --tuning"),
        (("--tuning", "--variant", "a=nothing"), "write it as"),
        (("--tuning", "--variant", "a=words"), "a method that is trained"),
        (("--methods", "xty"), "'xty' is unknown; known are one_vector"),
        (("--tuning", "--creatures", "31"), "--creatures is 31; --tuning has 30"),
        (("--report_only",), "no cell is measured"),
    ],
)
def test_mistakes_are_one_line(measured, capsys, words, message):
    code, seen = measured(*words)
    error = capsys.readouterr().err
    assert code and not seen and message in error and "Traceback" not in error


def test_no_creature_of_the_table_is_tuned_on():
    tuned = range(methods_table.FIRST_OF_TUNING, methods_table.FIRST_OF_TUNING + methods_table.MOST_OF_TUNING)
    assert max(tuned) == 129 and methods_table.FIRST_CREATURE > 9000


def test_the_images_of_a_creature_have_masks_and_a_judged_prompt_is_never_trained(tmp_path, monkeypatch):
    concept = methods_table.concept_of(tmp_path, 9001)
    masks = sorted(concept.folder.glob("*-masklabel.png"))
    assert len(masks) == len(concept.images) == 5
    assert 0.05 < np.asarray(Image.open(masks[0])).mean() / 255 < 0.8
    several = [dataclasses.replace(concept, creature=world.creature(seed)) for seed in range(100)]
    asked = {edit.value for one in several for edit in edits_of(one.creature, one.backgrounds)}
    assert asked >= {"beach", "forest", "night", "snow", "sketch", "neon", "mosaic", "painting"}
    methods_table.check_disjoint([concept, *several])
    judged = next(edit for edit in edits_of(concept.creature) if edit.group == "scene")
    monkeypatch.setattr(methods_table, "PROMPTS", (f"{{}} and a house, {judged.prompt}",))
    with pytest.raises(UserError, match="is trained with and judged"):
        methods_table.check_disjoint([concept])
