"""The second phase of scripts/study_inversions.py: generate with what was learned, and judge the pictures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.study.plan import Inversion, Study, read_record, write_record
from benchmarks.study.summary import CREATURE, WORDS
from ldm.commands.evaluate import features_of, judge_of, load_model, sampling_of
from ldm.embeddings import read
from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.evaluate import Asked, Evaluation, Rows, what_to_ask
from ldm.evaluation.judge import AttributeJudge
from ldm.files import file_hash
from ldm.generate import load_embeddings
from ldm.generate.images import save_image
from ldm.images import image_grid
from ldm.models.features import load_features
from ldm.util import UserError
from scripts.study_invert import inversions

_SHOWN, _SHOWN_OF_EDIT = 4, 1


def measure(options: argparse.Namespace) -> None:
    """Measure the inversions that are there and were not measured so before, and what they are compared with."""
    study = Study(options.out.absolute())
    there = [one for one in inversions(options) if study.record(one).is_file()]
    if not there:
        raise UserError(
            f"there is no inversion in '{options.out}'; run: python scripts/study_inversions.py invert"
        )
    settings = settings_of(options)
    names = [
        name for name in dict.fromkeys(one.concept for one in there) if not measured(study, name, settings)
    ]
    todo = [one for one in there if not measured(study, one.id, settings)]
    if not (names or todo):
        return
    bench = make_bench(options)
    with tqdm(total=len(names) + len(todo), desc="measuring", unit="concept", disable=None) as bar:
        for name in names:
            bar.set_postfix_str(name)
            concept = read_concept(study.concept(name))
            figures, rows = without_inversion(bench, concept, options)
            write(study, name, {"settings": settings, "references": figures}, rows)
            bar.update()
        for one in todo:
            bar.set_postfix_str(one.id)
            write(study, one.id, {"settings": settings} | of_inversion(bench, study, one, options), [])
            bar.update()


def measured(study: Study, name: str, settings: dict[str, Any]) -> bool:
    """Whether the figures are there, and were measured like this."""
    record = read_record(study.figures(name))
    return record is not None and record["settings"] == settings


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on besides the embedding."""
    judge = judge_of(options)
    weights = Path(judge or "") / "model.safetensors"
    return dataclasses.asdict(sampling_of(options)) | {
        "samples": options.samples,
        "edit_samples": options.edit_samples,
        "judge": judge,
        "judge_sha256": file_hash(weights) if judge and weights.is_file() else None,
        "features": features_of(options),
        "model_sha256": file_hash(options.ckpt_path),
    }


def make_bench(options: argparse.Namespace) -> Evaluation:
    """Model, judge and features, loaded."""
    judge_at, sources = judge_of(options), features_of(options)
    judge = AttributeJudge.load(judge_at) if judge_at else None
    model, size = load_model(options.ckpt_path, options.config)
    extractors = [load_features(source, model.device) for source in sources]
    return Evaluation(model, sampling_of(options), judge, extractors, size)


def without_inversion(
    bench: Evaluation, concept: ConceptFolder, options: argparse.Namespace
) -> tuple[dict[str, Any], Rows]:
    """What a concept's inversions are compared with: drawings, the first stage, and words."""
    rows: Rows = [("inputs", concept.pictures)]
    if concept.creature is None:
        styled = [one.styled for one in what_to_ask(concept, [], True, bench.size, bench.judge) if one.styled]
        return {}, [*rows, ("truth", [picture for one in styled for picture in one.pictures[:2]])]
    found, drawn = bench.references(concept)
    figures: dict[str, Any] = {name: {"likeness": likeness} for name, likeness in found.items()}
    for name, prompt in ((CREATURE, "a photo of a creature"), (WORDS, f"a photo of {concept.words}")):
        likeness, shown = bench.ask(concept, [Asked(prompt)], "", [], options.samples)
        figures[name] = {"likeness": likeness[prompt]}
        drawn += [(name, shown[0][1])]
    edits = [one for one in what_to_ask(concept, [], True, bench.size, bench.judge) if one.edit]
    figures[WORDS]["edits"], shown = bench.ask(concept, edits, concept.words or "", [], options.edit_samples)
    drawn[-1] = (WORDS, strip(drawn[-1][1], shown))
    return figures, rows + drawn


def of_inversion(
    bench: Evaluation, study: Study, one: Inversion, options: argparse.Namespace
) -> dict[str, Any]:
    """Likeness and edits of a creature, or four species in a style; its strip of pictures is written."""
    concept = read_concept(study.concept(one.concept))
    load_embeddings(bench.model, study.embedding(one))
    triggers = read(study.embedding(one)).triggers
    first, *others = what_to_ask(concept, [], True, bench.size, bench.judge)
    likeness, shown = bench.ask(concept, [first], triggers[0], triggers, options.samples)
    rest, more = bench.ask(concept, others, triggers[0], triggers, options.edit_samples)
    pictures = strip(shown[0][1], more) if concept.creature else [p for _, row in more for p in row[:2]]
    save(study, one.id, pictures)
    record = read_record(study.record(one)) or {}
    kind = "edits" if concept.creature else "styled"
    return {"seconds": record.get("seconds"), "likeness": next(iter(likeness.values())), kind: rest}


def strip(photos: Sequence[Image.Image], edits: Rows) -> list[Image.Image]:
    """Some pictures of the plain prompt, then one of each edit."""
    return [*photos[:_SHOWN], *(picture for _, row in edits for picture in row[:_SHOWN_OF_EDIT])]


def write(study: Study, name: str, record: dict[str, Any], rows: Rows) -> None:
    """The pictures first: figures say that all is there."""
    for label, pictures in rows:
        save(study, f"{name}-{label}", pictures)
    write_record(study.figures(name), record)


def save(study: Study, name: str, pictures: Sequence[Image.Image]) -> None:
    save_image(image_grid(pictures, len(pictures)), study.pictures(name))
