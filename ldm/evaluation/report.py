"""Figures as tables that people read, what they were measured with, and sheets of images."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ldm.images import image_grid, labelled


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], scale: int = 3) -> Image.Image:
    """One picture with a row of pictures, `scale` times as large, above each label; at least one row."""
    return stacked([labelled(image_grid(list(row), len(row), scale=scale), label) for label, row in rows])


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, on white."""
    whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        whole.paste(strip, (0, top))
        top += strip.height
    return whole


_PACKAGES = ("torch", "transformers", "numpy", "pillow", "kornia")

# Columns by the path of a figure; those that no row has are left out.
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
    """What the figures were made with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine()} | found


def table(title: str, columns: Mapping[str, str], rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table, one row of figures to a name; a column nobody has a figure for is left out."""
    rows = list(rows)
    kept = [key for key in columns if any(figures.get(key) is not None for _, figures in rows)]
    lines = [_line([title, *(columns[key] for key in kept)]), _line(["---"] + ["---:"] * len(kept))]
    lines += [_line([name, *(_shown(figures.get(key)) for key in kept)]) for name, figures in rows]
    return "\n".join(lines) + "\n"


def flat_features(figures: Mapping[str, Any]) -> dict[str, float]:
    """The protocol's figures of one prompt by column, as "CLIP-I pairwise towers"."""
    found = {}
    for name, measures in (figures.get("features") or {}).items():
        for measure, readings in measures.items():
            for reading, value in readings.items():
                found[f"{measure.upper().replace('_', '-')} {reading}, {name}"] = value
    return found


def concept_report(name: str, figures: Mapping[str, Any]) -> str:
    """The tables of one concept."""
    prompts = list(figures["prompts"].items())
    parts = [f"## {name}\n"]
    for columns, chosen in (
        (IDENTITY, [row for row in prompts if "asks_for" not in row[1] and "style" not in row[1]]),
        (EDIT, [row for row in prompts if "asks_for" in row[1]]),
        (STYLED, [row for row in prompts if "style" in row[1]]),
    ):
        rows = [(_quoted(prompt), {**found, **flat_features(found)}) for prompt, found in chosen]
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
            f"(redrawn); beyond 0.5 it counts as still itself, as {scale['itself_taken']:.0%} of redrawn pictures do "
            f"and {scale['others_taken']:.0%} of other creatures.\n"
        )
    return "\n".join(parts)


def _quoted(prompt: str) -> str:
    return prompt.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
