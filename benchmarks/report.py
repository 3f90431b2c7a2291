"""The results of a benchmark as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import ROOT
from ldm.files import write_text

RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Report:
    """A table of results with settings and machine; `data` has the numbers that the table was made from."""

    name: str
    title: str
    columns: Sequence[str]
    settings: dict[str, Any]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine.describe_machine)

    def markdown(self) -> str:
        """Return title, table and notes, followed by the machine and the settings."""
        facts = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        gpu = f", {facts['gpu']}" if facts["gpu"] else ""
        lines = [f"# {self.title}", "", *table(self.columns, self.rows), ""]
        lines += [f"- {note}" for note in self.notes]
        lines += [
            f"- {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads{gpu}, {facts['system']}",
            f"- Python {facts['python']}, {versions}",
            f"- {facts['date']}, commit {facts['commit']}, load at the start {facts['load']}",
            "- " + ", ".join(f"{key} {value}" for key, value in self.settings.items()),
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path | None = None) -> Path:
        """Write `<name>.json` and `<name>.md` atomically into `folder` or RESULTS; return the path of the latter."""
        folder = folder or RESULTS
        kept = ("title", "machine", "settings", "columns", "rows", "notes", "data")
        content = {key: getattr(self, key) for key in kept}
        write_text(folder / f"{self.name}.json", json.dumps(content, indent=1) + "\n")
        path = folder / f"{self.name}.md"
        write_text(path, self.markdown())
        return path


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of an aligned Markdown table; raises ValueError for a row of another length."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} columns")
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(columns), line(["-" * width for width in widths]), *map(line, rows)]


def verdict(value: float, bar: float, *, at_most: bool = False) -> str:
    """Return whether `value` meets `bar`, and if not, by how much it misses it."""
    met = value <= bar if at_most else value >= bar
    sign = "<=" if at_most else ">="
    return f"{sign} {bar:g}: met" if met else f"{sign} {bar:g}: missed by {abs(value - bar) / bar:.0%}"
