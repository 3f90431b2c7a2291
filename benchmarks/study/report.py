"""The third phase of a study: means, standard deviations and bars as JSON, Markdown and a contact sheet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.study.invert import image_size, inversions
from benchmarks.study.plan import Inversion, Study, read_record, write_record
from benchmarks.study.summary import WORDS, Bar, Summary, bars, relative_color_distance, summarize
from ldm.evaluation.evaluate import REDRAWN
from ldm.evaluation.report import stacked, table, versions
from ldm.files import write_text
from ldm.generate.images import save_image
from ldm.images import enlarged, labelled
from ldm.util import UserError

_CREATURES_SHOWN, _SCALE = 8, 2


def report(options: argparse.Namespace) -> None:
    """Write study.json, study.md and study.png of all figures measured so far, and print their paths."""
    study = Study(options.out.absolute())
    wanted = inversions(options)
    found = {one: record for one in wanted if (record := read_record(study.figures(one.id)))}
    if not found:
        raise UserError(f"'{options.out}' has no figures; run: python -m benchmarks.study.inversions measure")
    if len({json.dumps(record["settings"], sort_keys=True) for record in found.values()}) > 1:
        raise UserError(
            f"'{options.out}' has figures of several settings; run the phase measure again with those that you want"
        )
    creatures = {one: record for one, record in found.items() if "edits" in record}
    summaries = {
        count: summarize({one: record for one, record in creatures.items() if one.vectors == count})
        for count in options.vectors
    }
    styles = {
        f"{name}, {count} vector{'s' * (count > 1)}": summarize(
            {
                one: r
                for one, r in found.items()
                if "styled" in r and (one.concept, one.vectors) == (name, count)
            }
        )
        for name in dict.fromkeys(one.concept for one in wanted)
        for count in options.vectors
    }
    styles = {name: summary for name, summary in styles.items() if summary}
    references = summarize_references(study, [one.concept for one in creatures])
    reached = bars(summaries, references, image_size()) if creatures else []
    content = {
        "versions": versions(),
        "measured": next(iter(found.values()))["settings"],
        "inverted": (read_record(study.record(next(iter(found)))) or {}).get("settings"),
        "inversions": {"planned": len(wanted), "measured": len(found)},
        "references": references,
        "vectors": {str(count): summary for count, summary in summaries.items()},
        "styles": styles,
        "bars": [{**vars(bar), "met": bar.met} for bar in reached],
    }
    write_record(study.folder / "study.json", content)
    write_text(study.folder / "study.md", markdown(content, reached, summaries, references))
    save_image(contact_sheet(study, wanted), study.folder / "study.png")
    for suffix in ("json", "md", "png"):
        print(options.out / f"study.{suffix}")


def summarize_references(study: Study, concepts: Sequence[str]) -> dict[str, Summary]:
    """Summarize the figures of the references over creatures."""
    by_name: dict[str, dict[Inversion, Mapping[str, Any]]] = {}
    for concept in dict.fromkeys(concepts):
        record = read_record(study.figures(concept)) or {}
        for name, figures in record.get("references", {}).items():
            by_name.setdefault(name, {})[Inversion(concept, 0, 0)] = figures
    return {name: summarize(measured) for name, measured in by_name.items()}


def markdown(
    content: Mapping[str, Any],
    reached: Sequence[Bar],
    summaries: Mapping[int, Summary],
    references: Mapping[str, Summary],
) -> str:
    """Return the study as Markdown tables."""
    done = content["inversions"]
    parts = [
        "# Inversions\n",
        f"{done['measured']} of {done['planned']} inversions. In brackets: standard deviations over creatures / "
        "over seeds. Distances in CIELAB; identity is 0 for other creatures and 1 for the same one "
        "redrawn; both: an edit obeyed and the creature still itself, identity beyond 0.5.\n",
    ]
    rows = [(name, summary) for name, summary in references.items()]
    rows += [(f"{count} vector{'s' * (count > 1)}", summary) for count, summary in summaries.items()]
    likeness = ["attributes", "identity", "color_distance", "retrieved", "rank", "clip_i", "seconds"]
    parts.append(_summary_table("likeness", likeness, rows))
    distances = [
        f"{name}: {distance:.2f}"
        for name, s in rows
        if (distance := relative_color_distance(s, references)) is not None
    ]
    parts.append(f"Colour distance, from redrawn (0) to a photo of a creature (1): {', '.join(distances)}\n")
    edits = [f"{group} {what}" for group in ("all", "plain", "scene", "style") for what in ("obeyed", "both")]
    parts.append(_summary_table("edits", edits, [row for row in rows if any(key in row[1] for key in edits)]))
    if content["styles"]:
        styled = ["style", "in_style", "kind", "kind_of_truth", "seconds"]
        parts.append(_summary_table("held-out style", styled, list(content["styles"].items())))
    judged = [(bar.text, {"value": bar.value, "bound": _bound(bar), "met": _met(bar)}) for bar in reached]
    parts.append(table("bar", {"value": "measured", "bound": "asked for", "met": "met"}, judged))
    return "\n".join(parts)


def contact_sheet(study: Study, wanted: Sequence[Inversion]) -> Image.Image:
    """Show some concepts: their images, captions, and the results of each number of vectors, for the first seed."""
    strips: list[Image.Image] = []
    names = list(dict.fromkeys(one.concept for one in wanted))
    shown = [name for name in names if _is_style(study, name)]
    shown = [name for name in names if name not in shown][:_CREATURES_SHOWN] + shown
    for name in shown:
        first = [one for one in wanted if one.concept == name and one.seed == 0]
        parts = [(label, study.images(f"{name}-{label}")) for label in ("inputs", REDRAWN, WORDS, "truth")]
        then = edits_shown(study, name)
        parts[2] = (WORDS + then, parts[2][1])
        parts += [
            (f"{one.vectors} vector{'s' * (one.vectors > 1)}{then}", study.images(one.id)) for one in first
        ]
        strips += [_labelled(f"{name}: {label}", path) for label, path in parts if path.is_file()]
    return stacked(strips)


def edits_shown(study: Study, name: str) -> str:
    """Return the label of the edits in a creature's strips."""
    record = read_record(study.figures(name)) or {}
    edits = record.get("references", {}).get(WORDS, {}).get("edits", {}).values()
    return "".join(f", {edit['asks_for'].partition(': ')[2]}" for edit in edits)


def _labelled(text: str, path: Path) -> Image.Image:
    with Image.open(path) as image:
        return labelled(enlarged(image.convert("RGB"), _SCALE), text)


def _is_style(study: Study, name: str) -> bool:
    return study.images(f"{name}-truth").is_file()


def _summary_table(title: str, keys: Sequence[str], rows: Sequence[tuple[str, Summary]]) -> str:
    cells = [
        (name, {key: _format_summary(summary[key]) for key in keys if key in summary})
        for name, summary in rows
    ]
    return table(title, {key: key.replace("_", " ") for key in keys}, cells)


def _format_summary(figure: Mapping[str, Any]) -> str:
    deviations = [
        "-" if figure[key] is None else f"{figure[key]:.2f}" for key in ("over_creatures", "over_seeds")
    ]
    return f"{figure['mean']:.3f} ({' / '.join(deviations)})"


def _bound(bar: Bar) -> str | None:
    return None if bar.bound is None else f"{'at least' if bar.at_least else 'at most'} {bar.bound:.3g}"


def _met(bar: Bar) -> str:
    return {True: "yes", False: "**no**", None: "not measured"}[bar.met]
