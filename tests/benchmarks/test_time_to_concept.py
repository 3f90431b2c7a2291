from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from benchmarks import runs, scores, time_to_concept, waypoints
from benchmarks.report import Report
from benchmarks.scores import Scorer, creatures
from benchmarks.subjects import CONCEPT
from benchmarks.time_to_concept import compared, digest, factor, fill, reached, scored
from ldm.evaluation.concepts import read_concept
from ldm.evaluation.edits import edits_of
from ldm.generate.embeddings import load_embeddings


def test_the_target_must_be_held_at_the_next_waypoint():
    curve = [(10, 1.0, 0.2), (20, 2.0, 0.6), (30, 3.0, 0.4), (40, 4.0, 0.5), (50, 5.0, 0.7)]
    assert reached(curve, 0.5) == 40  # at step 20 it was luck
    assert reached(curve, 0.6) == 50
    assert reached(curve, 0.1) == 10
    assert reached(curve, 0.8) is None


def result(identity: float, seconds: float, edits: float = 0.5) -> dict:
    curve = [(1, seconds / 2, 0.5 * identity), (2, seconds, identity)]
    return {"curve": curve, "seconds": seconds, "identity": identity, "edits": edits}


def test_both_recipes_have_the_target_that_paper_sets():
    one = compared(result(0.8, 100.0), result(0.75, 8.0))
    assert one["aim"] == pytest.approx(0.72)
    assert one["steps"] == {"paper": 2, "fast": 2}
    assert compared(result(0.8, 100.0), result(0.5, 8.0))["steps"] == {"paper": 2, "fast": None}


def test_the_factor_is_that_of_the_rounds() -> None:
    # The machine was busy in the second round, and in one half of the third.
    assert factor({"paper": [10.0, 20.0, 20.0], "fast": [1.0, 2.0, 1.0]}) == 10
    assert factor({"paper": [10.0], "fast": [math.inf]}) == 0


def test_runs_are_timed_until_their_step(tmp_path, monkeypatch) -> None:
    ended = []

    class Run:
        def __init__(self, recipe: str) -> None:
            self.recipe, self.trainer = (
                recipe,
                SimpleNamespace(callbacks=[], global_step=0, should_stop=False),
            )

        def fit(self) -> None:
            (end,) = self.trainer.callbacks
            end.on_fit_start(self.trainer, None)
            end.on_train_start(self.trainer, None)
            while not self.trainer.should_stop:
                self.trainer.global_step += 1
                end.on_train_batch_end(self.trainer, None, None, {}, 0)
            ended.append((self.recipe, self.trainer.global_step))

    monkeypatch.setattr(time_to_concept, "warm_up", lambda work: None)
    monkeypatch.setattr(time_to_concept, "prepared", lambda concept, recipe, *_: Run(recipe))
    seconds = time_to_concept.timed((CONCEPT, {"paper": 3, "fast": 0}, 2, tmp_path))
    assert ended == [("paper", 3), ("fast", 0)] * 2, "in turns"
    assert all(len(of) == 2 and 0 <= min(of) < 1 for of in seconds.values())
    never = time_to_concept.timed((CONCEPT, {"paper": None, "fast": 1}, 1, tmp_path))
    assert never["paper"] == [math.inf]


def test_the_table_shows_missed_bars(tmp_path):
    report = Report("t", "T", ("concept", "aim", "p", "f", "ps", "fs", "x", "identity", "edits"), {})
    timed = {"paper": [3.0], "fast": [math.inf]}
    fill(report, {"bobo": {**compared(result(0.8, 100.0), result(0.5, 8.0)), "timed": timed}})
    text = report.markdown()
    assert "| bobo" in text and "never" in text and "inf" in text and "missed by 100%" in text
    assert "fewer than 6" in text


def saved(model: Any, path: Path) -> Tensor:
    load_embeddings(model, path)
    return model.embedding_manager.export()["*"]


def test_a_run_saves_its_waypoints(subject, tmp_path):
    run = runs.prepare(
        subject.argv(
            tmp_path, "--max_steps", "4", "lightning.callbacks.image_logger.params.batch_frequency=0"
        ),
        subject.make,
    )
    run.trainer.callbacks.insert(0, waypoints.Waypoints(tmp_path / "way", steps=(0, 1, 3, 9)))
    assert waypoints.read_waypoints(tmp_path / "way") is None
    run.fit()
    passed, learned = waypoints.read_waypoints(tmp_path / "way"), run.model.embedding_manager.export()["*"]
    assert list(passed) == [0, 1, 3, 4]
    assert 0 < passed[0] < passed[1] < passed[3] < passed[4]
    first, last = (saved(run.model, tmp_path / "way" / f"{step}.pt") for step in (1, 4))
    assert not first.equal(last)
    assert last.equal(learned)


class Counting:
    def __init__(self) -> None:
        self.scored_files: list[Path] = []

    def identity(self, vectors: Path, concept: object) -> float:
        self.scored_files.append(vectors)
        return 0.5

    def editability(self, vectors: Path, concept: object) -> float:
        self.scored_files.append(vectors)
        return 0.25


def test_nothing_is_scored_twice(tmp_path):
    (tmp_path / waypoints.LIST).write_text(json.dumps({"5": 1.5, "10": 2.5}))
    scorer = Counting()
    first = scored(scorer, CONCEPT, tmp_path)
    assert first["curve"] == [(5, 1.5, 0.5), (10, 2.5, 0.5)]
    assert (first["seconds"], first["identity"], first["edits"]) == (2.5, 0.5, 0.25)
    assert [path.name for path in scorer.scored_files] == ["5.pt", "10.pt", "result.pt", "result.pt"]
    assert scored(Counting(), CONCEPT, tmp_path) == first
    again = Counting()
    scored(again, CONCEPT, tmp_path)
    assert again.scored_files == []


def test_another_recipe_or_model_has_another_digest(tmp_path, monkeypatch):
    settings = {"model": "a", "threads": 2}
    before = digest("fast", settings)
    assert before == digest("fast", dict(settings))
    assert before != digest("paper", settings)
    assert before != digest("fast", settings | {"model": "b"})
    (tmp_path / "other.yaml").write_text("model: {}")
    monkeypatch.setattr(time_to_concept, "recipe_of", lambda name: tmp_path / "other.yaml")
    assert before != digest("fast", settings)


def test_scores_are_those_of_the_evaluation(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "edits_of", lambda creature, seen: edits_of(creature, seen)[:1])
    tiny_model.embedding_manager.save(tmp_path / "e.pt")
    scorer = Scorer(tiny_model, None, images=2, edit_images=1, steps=2)
    concept = read_concept(CONCEPT)
    identity = scorer.identity(tmp_path / "e.pt", concept)
    assert identity == scorer.identity(tmp_path / "e.pt", concept)
    assert -3 < identity < 0.6  # it has learned nothing
    assert 0 <= scorer.editability(tmp_path / "e.pt", concept) <= 1


def test_the_sample_creatures_are_enough():
    found = creatures(CONCEPT.parent)
    assert len(found) >= 6 and CONCEPT in found
    assert all(read_concept(folder).creature is not None for folder in found)
