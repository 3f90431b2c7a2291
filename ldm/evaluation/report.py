"""Figures as Markdown tables, the versions of packages, and contact sheets of images."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ldm.images import image_grid, labelled


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], scale: int = 3) -> Image.Image:
    """Return one image with a row of images, enlarged by `scale`, and a label for each of `rows` (at least one)."""
    return stacked([labelled(image_grid(list(row), len(row), scale=scale), label) for label, row in rows])


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Stack images vertically on a white background."""
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    return canvas


_PACKAGES = ("torch", "transformers", "numpy", "pillow", "kornia")

# Titles of the columns by key of the figures.
IDENTITY = {
    "attributes": "attributes",
    "identity": "identity",
    "itself": "still itself",
    "color_distance": "colour distance",
    "palette_overlap": "palette",
    "silhouette": "silhouette",
    "retrieved": "first of all creatures",
    "rank": "rank",
}
EDIT = {
    "asks_for": "asks for",
    "obeyed": "obeyed",
    "itself": "still itself",
    "both": "both",
    "identity": "identity",
}
STYLED = {
    "style": "style",
    "in_style": "in the style",
    "kind": "species",
    "kind_of_truth": "species, on true ones",
}


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages, and the type of machine."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine()} | found


def table(title: str, columns: Mapping[str, str], rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Return a Markdown table with one row per name; columns for which no row has a figure are left out."""
    rows = list(rows)
    kept = [key for key in columns if any(figures.get(key) is not None for _, figures in rows)]
    lines = [_line([title, *(columns[key] for key in kept)]), _line(["---"] + ["---:"] * len(kept))]
    lines += [_line([name, *(_format(figures.get(key)) for key in kept)]) for name, figures in rows]
    return "\n".join(lines) + "\n"


def flat_features(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the CLIP figures of one prompt by column title, as "CLIP-I pairwise, towers"."""
    found = {}
    for name, measures in (figures.get("features") or {}).items():
        for measure, values in measures.items():
            for definition, value in values.items():
                found[f"{measure.upper().replace('_', '-')} {definition}, {name}"] = value
    return found


def concept_report(name: str, figures: Mapping[str, Any]) -> str:
    """Return the tables of one concept, as Markdown."""
    prompts = list(figures["prompts"].items())
    parts = [f"## {name}\n"]
    for columns, chosen in (
        (IDENTITY, [row for row in prompts if "asks_for" not in row[1] and "style" not in row[1]]),
        (EDIT, [row for row in prompts if "asks_for" in row[1]]),
        (STYLED, [row for row in prompts if "style" in row[1]]),
    ):
        rows = [(_escape(prompt), {**found, **flat_features(found)}) for prompt, found in chosen]
        if columns is IDENTITY:
            references = figures.get("references", {}).items()
            rows += [(name, {**found, **flat_features(found)}) for name, found in references]
        if rows:
            extra = {key: key for _, found in rows for key in found if key.startswith("CLIP-")}
            parts.append(table("prompt", {**columns, **extra}, rows))
    scale = figures.get("calibration")
    if scale:
        parts.append(
            f"Identity is 0 at raw likeness {scale['floor']:.3f} (other creatures) and 1 at {scale['ceiling']:.3f} "
            f"(the creature redrawn). Images beyond 0.5 count as still itself: {scale['itself_taken']:.0%} of those "
            f"redrawn, {scale['others_taken']:.0%} of other creatures.\n"
        )
    return "\n".join(parts)


def _escape(prompt: str) -> str:
    return prompt.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
