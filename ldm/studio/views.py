"""What the page shows of runs and words, as HTML and SVG without scripts; every text from outside is escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from ldm.studio.queue import Job
from ldm.studio.workspace import Finding, Thumbnail, Word
from ldm.training.callbacks.progress import duration
from ldm.training.record import RunRecord

STATES = {
    "starting": "starting",
    "training": "training",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "lost": "ended",
    "unknown": "earlier",
    "waiting": "waiting",
    "running": "starting",
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 320, 116, 50, 20


def message(text: str, kind: str = "note") -> str:
    """One line in a frame; the kinds are note, good, warn and bad."""
    return f'<p class="line {kind}" role="status">{escape(text)}</p>' if text else ""


def finding_list(found: Sequence[Finding], count: int) -> str:
    """What is unusual about a set of images, or that nothing is."""
    if not found:
        return message(f"{count} images, nothing unusual", "good")
    items = "".join(f'<li class="{"bad" if one.bad else "warn"}">{escape(one.text)}</li>' for one in found)
    return f'<ul class="findings">{items}</ul>'


def thumbnails(folder: str, images: Sequence[Thumbnail]) -> str:
    """The images of a folder as training sees them, each with a field for its caption."""
    cells = ""
    for one in images:
        name, caption = escape(one.name), escape(one.caption)
        cells += f'<figure><img src="{one.address}" alt="{name}" title="{name}">'
        # The value is set twice: gradio updates a field by its attribute only.
        cells += (
            f'<textarea name="{name}" aria-label="caption of {name}" placeholder="caption" value="{caption}" '
        )
        cells += f'title="{caption}" rows="2">{caption}</textarea></figure>'
    side = images[0].side if images else None
    size = f", {side} x {side} pixels" if side else ""
    head = f'<p class="head">As training sees them{size}; captions</p>'
    return f'{head}<div class="thumbnails" data-folder="{escape(folder)}">{cells}</div>'


def tokens(pieces: Sequence[str], vectors: int) -> str:
    """The tokens of the initialization text as the encoder sees them, and how they are shared among the vectors."""
    if not pieces:
        return '<p class="line note">without a text, the vectors start at random, like the vocabulary\'s</p>'
    shown = "".join(f'<span class="token">{escape(piece)}</span>' for piece in pieces)
    notes = []
    if len(pieces) > vectors:
        notes.append(f"{len(pieces)} tokens for {count(vectors, 'vector')}: not all of them are used")
    elif vectors > len(pieces):
        notes.append(f"{vectors} vectors share {count(len(pieces), 'token')}")
    if vectors > 1:
        notes.append(
            f"each vector more is closer to the images and harder to edit; {vectors} of a prompt's tokens"
        )
    return f'<p class="tokens">{shown}<small> {"; ".join(notes)}</small></p>'


def count(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number} {what}{'s' * (number != 1)}"


def run_line(run: RunRecord) -> str:
    """Name, step, pace and time left of a run, in one line."""
    facts = [STATES.get(run.state, run.state), f"step {run.step}" + (f" of {run.total}" if run.total else "")]
    facts += [f"{duration(run.seconds_left)} left"] if run.seconds_left is not None else []
    return f'<p class="now"><b>{escape(", ".join(run.words) or run.folder.name)}</b> {escape(", ".join(facts))}</p>'


def run_row(run: RunRecord) -> list[str]:
    """A line of the table of runs."""
    step = f"{run.step}/{run.total}" if run.total else str(run.step or "")
    left = f"{duration(run.seconds_left)} left" if run.seconds_left is not None else _ago(run.updated)
    return [STATES.get(run.state, run.state), ", ".join(run.words) or "", step, left, run.folder.name]


def job_row(job: Job) -> list[str]:
    """A line of the table of the queue."""
    return [STATES.get(job.state, job.state), job.title, job.device, job.message or "", job.id]


def run_head(run: RunRecord) -> str:
    """State, progress, pace and verdict of one run."""
    share = min(1.0, run.step / run.total) if run.total else 0.0
    facts = [f"step {run.step}" + (f" of {run.total}" if run.total else "")]
    if run.live and run.rate:
        facts.append(f"{run.rate:.1f} steps/s" if run.rate >= 1 else f"{1 / run.rate:.1f} s/step")
    if run.seconds_left is not None:
        facts.append(f"{duration(run.seconds_left)} left")
    if run.loss is not None:
        facts.append(f"loss {run.loss:.4f}")
    facts += [run.device] if run.device else []
    facts += [f"{run.images} image{'s' * (run.images != 1)}"] if run.images else []
    words = " ".join(f"<b>{escape(word)}</b>" for word in run.words)
    bar = (
        f'<div class="bar" aria-label="progress"><i style="width:{share:.1%}"></i></div>' if run.total else ""
    )
    kind = "bad" if run.state in ("failed", "lost") else "good" if run.state == "finished" else "note"
    said = message(run.message, kind) if run.message and not run.live else ""
    warned = "".join(message(text, "warn") for text in run.warnings[-5:])
    return (
        f'<div class="run"><span class="state {escape(run.state)}">{STATES.get(run.state, "")}</span> {words} '
        f"<small>{escape(run.folder.name)}</small>{bar}<small>{escape(' · '.join(facts))}</small>{said}{warned}</div>"
    )


def curves(runs: Sequence[RunRecord]) -> str:
    """The curves of one run, or of several over each other, one panel for each kind."""
    found = [(run, run.curves()) for run in runs]
    names = list(dict.fromkeys(name for _, several in found for name in several))
    if not names:
        return message("the curves begin after the first measurement")
    panels = "".join(
        _panel(name, [(run.folder.name, several[name]) for run, several in found if name in several])
        for name in names
    )
    legend = ""
    if len(runs) > 1:
        items = (f'<span class="c{n % 6}">{escape(run.folder.name)}</span>' for n, run in enumerate(runs))
        legend = f'<p class="legend">{"".join(items)}</p>'
    return f'<div class="curves">{panels}</div>{legend}'


def _panel(title: str, series: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    points = [point for _, values in series for point in values]
    last = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(step: int, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 6) * step / last
        y = 8 + (_HEIGHT - _BOTTOM - 12) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = "".join(
        f'<polyline class="c{number % 6}" points="{" ".join(place(*point) for point in _thinned(values))}">'
        f"<title>{escape(name)}: {values[-1][1]:.4g} at step {values[-1][0]}</title></polyline>"
        for number, (name, values) in enumerate(series)
    )
    for number, (_, values) in enumerate(series):
        if len(values) == 1:  # a line of one point would not be seen
            x, y = place(*values[0]).split(",")
            lines += f'<circle class="c{number % 6}" cx="{x}" cy="{y}" r="2.5"/>'
    now = f" {series[0][1][-1][1]:.4g}" if len(series) == 1 else ""
    return (
        f'<figure><figcaption>{escape(title)}<b>{now}</b></figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><path class="axis" d="M{_LEFT} 4V{_HEIGHT - _BOTTOM}H{_WIDTH - 4}"/>'
        f'<text x="{_LEFT - 4}" y="14" text-anchor="end">{high - margin:.3g}</text>'
        f'<text x="{_LEFT - 4}" y="{_HEIGHT - _BOTTOM - 4}" text-anchor="end">{low + margin:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">0</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 4}" text-anchor="end">step {last}</text>{lines}</svg></figure>'
    )


def _thinned(values: Sequence[tuple[int, float]], most: int = 300) -> Sequence[tuple[int, float]]:
    if len(values) <= most:
        return values
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]


def preview(runs: Sequence[RunRecord], number: int) -> str:
    """The preview at a place of the strip, of each run, with small ones of the neighbouring steps to step through."""
    cells = []
    for run in runs:
        found = run.previews()
        if not found:
            continue
        step, _ = found[min(number, len(found) - 1)]
        address = f"view/run/{quote(run.folder.name)}/{step}"
        name = f"<small>{escape(run.folder.name)}</small>" if len(runs) > 1 else ""
        cells.append(
            f"<figure><figcaption>step {step} {name}</figcaption>"
            f'<img src="{address}" alt="what the word gives at step {step}"></figure>'
        )
    return (
        f'<div class="previews n{len(cells)}">{"".join(cells)}</div>' if cells else message("no previews yet")
    )


def strip(run: RunRecord, most: int = 12) -> str:
    """Small previews over time; a click on one shows it (see page.js)."""
    found = _thinned([(number, step) for number, (step, _) in enumerate(run.previews())], most)
    cells = "".join(
        f'<img src="view/run/{quote(run.folder.name)}/{step}" data-number="{number}" title="step {step}" '
        f'alt="step {step}">'
        for number, step in found
    )
    return f'<div class="strip">{cells}</div>'


def nearest(trigger: str, norms: Sequence[float], rows: Sequence[Sequence[tuple[str, float]]] | None) -> str:
    """Norms of a word's vectors and the vocabulary's nearest words."""
    if rows is None:
        return message(
            "the model at hand has another width: nearest words need the model that it was learned on"
        )
    body = "".join(
        f"<tr><td>{number}</td><td>{norm:.3f}</td><td>"
        + " ".join(f"{escape(word)} <small>{value:.2f}</small>" for word, value in row)
        + "</td></tr>"
        for number, (norm, row) in enumerate(zip(norms, rows, strict=True), start=1)
    )
    head = "<tr><th>vector<th>norm<th>nearest words</tr>"
    return f'<table class="near"><caption>{escape(trigger)}</caption>{head}{body}</table>'


def word_row(word: Word) -> list[str]:
    """A line of the table of words."""
    norm = "" if word.norm is None else f"{word.norm:.3f}"
    return [word.trigger, str(word.vectors), norm, word.models.removeprefix("a model whose "), word.source]


def facts(values: Mapping[str, object]) -> str:
    """Names with values, as a list."""
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in values.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0)
    if seconds < 86_400:
        return f"{duration(seconds)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(moment))
