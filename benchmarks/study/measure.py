"""The second phase of a study: generate images with the learned embeddings, and measure them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.study.invert import inversions
from benchmarks.study.plan import Inversion, Study, read_record, write_record
from benchmarks.study.summary import CREATURE, WORDS
from ldm.commands.evaluate import features_of, judge_of, load_model, sampling_of
from ldm.embeddings import read
from ldm.evaluation.concepts import ConceptFolder, read_concept
from ldm.evaluation.evaluate import Evaluation, EvaluationPrompt, Rows, evaluation_prompts
from ldm.evaluation.judge import AttributeJudge
from ldm.files import file_hash
from ldm.generate import load_embeddings
from ldm.generate.images import save_image
from ldm.images import image_grid
from ldm.models.features import load_features
from ldm.util import UserError

# Images in a strip: of the plain prompt, and of each edit.
_SHOWN, _SHOWN_OF_EDIT = 4, 1


def measure(options: argparse.Namespace) -> None:
    """Measure all inversions, and the references of their concepts, unless they were measured with these settings."""
    study = Study(options.out.absolute())
    available = [one for one in inversions(options) if study.record(one).is_file()]
    if not available:
        raise UserError(
            f"'{options.out}' has no inversions; run: python -m benchmarks.study.inversions invert"
        )
    settings = settings_of(options)
    names = [
        name
        for name in dict.fromkeys(one.concept for one in available)
        if not is_measured(study, name, settings)
    ]
    todo = [one for one in available if not is_measured(study, one.id, settings)]
    if not (names or todo):
        return
    evaluation = load_evaluation(options)
    with tqdm(total=len(names) + len(todo), desc="measuring", unit="concept", disable=None) as bar:
        for name in names:
            bar.set_postfix_str(name)
            concept = read_concept(study.concept(name))
            figures, rows = measure_references(evaluation, concept, options)
            write(study, name, {"settings": settings, "references": figures}, rows)
            bar.update()
        for one in todo:
            bar.set_postfix_str(one.id)
            write(
                study, one.id, {"settings": settings} | measure_inversion(evaluation, study, one, options), []
            )
            bar.update()


def is_measured(study: Study, name: str, settings: dict[str, Any]) -> bool:
    """Return whether figures exist that were measured with these settings."""
    record = read_record(study.figures(name))
    return record is not None and record["settings"] == settings


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that figures depend on, besides the embedding."""
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


def load_evaluation(options: argparse.Namespace) -> Evaluation:
    """Load model, judge and feature extractors."""
    judge_at, sources = judge_of(options), features_of(options)
    judge = AttributeJudge.load(judge_at) if judge_at else None
    model, size = load_model(options.ckpt_path, options.config)
    extractors = [load_features(source, model.device) for source in sources]
    return Evaluation(model, sampling_of(options), judge, extractors, size)


def measure_references(
    evaluation: Evaluation, concept: ConceptFolder, options: argparse.Namespace
) -> tuple[dict[str, Any], Rows]:
    """Measure what a concept's inversions are compared with: renderings, the first stage, and captions."""
    rows: Rows = [("inputs", concept.images)]
    prompts = evaluation_prompts(concept, [], True, evaluation.size, evaluation.judge)
    if concept.creature is None:
        styled = [one.styled for one in prompts if one.styled]
        return {}, [*rows, ("truth", [image for one in styled for image in one.images[:2]])]
    baselines, strips = evaluation.measure_baselines(concept)
    figures: dict[str, Any] = {name: {"likeness": likeness} for name, likeness in baselines.items()}
    for name, prompt in ((CREATURE, "a photo of a creature"), (WORDS, f"a photo of {concept.words}")):
        likeness, shown = evaluation.measure(concept, [EvaluationPrompt(prompt)], "", [], options.samples)
        figures[name] = {"likeness": likeness[prompt]}
        strips += [(name, shown[0][1])]
    edits = [one for one in prompts if one.edit]
    figures[WORDS]["edits"], shown = evaluation.measure(
        concept, edits, concept.words or "", [], options.edit_samples
    )
    strips[-1] = (WORDS, strip(strips[-1][1], shown))
    return figures, rows + strips


def measure_inversion(
    evaluation: Evaluation, study: Study, one: Inversion, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure likeness and edits of a creature, or four species in a style, and write a strip of images."""
    concept = read_concept(study.concept(one.concept))
    load_embeddings(evaluation.model, study.embedding(one))
    triggers = read(study.embedding(one)).triggers
    first, *others = evaluation_prompts(concept, [], True, evaluation.size, evaluation.judge)
    likeness, shown = evaluation.measure(concept, [first], triggers[0], triggers, options.samples)
    rest, more = evaluation.measure(concept, others, triggers[0], triggers, options.edit_samples)
    images = strip(shown[0][1], more) if concept.creature else [p for _, row in more for p in row[:2]]
    save(study, one.id, images)
    record = read_record(study.record(one)) or {}
    kind = "edits" if concept.creature else "styled"
    return {"seconds": record.get("seconds"), "likeness": next(iter(likeness.values())), kind: rest}


def strip(photos: Sequence[Image.Image], edits: Rows) -> list[Image.Image]:
    """Return some images of the plain prompt, followed by one of each edit."""
    return [*photos[:_SHOWN], *(image for _, row in edits for image in row[:_SHOWN_OF_EDIT])]


def write(study: Study, name: str, record: dict[str, Any], rows: Rows) -> None:
    """Write images and figures; the figures last, because they mark the measurement as complete."""
    for label, images in rows:
        save(study, f"{name}-{label}", images)
    write_record(study.figures(name), record)


def save(study: Study, name: str, images: Sequence[Image.Image]) -> None:
    save_image(image_grid(images, len(images)), study.images(name))
