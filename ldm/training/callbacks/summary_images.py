"""Two images that summarize a run when it ends: its curves and its previews."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.callbacks import Callback

from ldm import files
from ldm.images import image_grid, labelled
from ldm.training.callbacks.base import callbacks_of
from ldm.training.callbacks.fixed_loss import DeterministicLoss
from ldm.training.callbacks.guard import VectorStats

logger = logging.getLogger(__name__)

WIDTH, HEIGHT = 720, 180
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 30, 24
INK, GREY, LINE, MARK = "black", "#bbbbbb", "#1f5fa8", "#c0392b"


@dataclass(frozen=True)
class Curve:
    """A titled curve: one value per step; values that are not finite are not drawn."""

    title: str
    steps: Sequence[float]
    values: Sequence[float]


def draw_curves(curves: Sequence[Curve], mark: int | None = None, axis: str = "step") -> Image.Image:
    """Draw one panel per curve, one below the other, with a common axis; `mark` is a step with a red line."""
    last = max((step for curve in curves for step in curve.steps), default=1) or 1
    sheet = Image.new("RGB", (WIDTH, HEIGHT * max(1, len(curves))), "white")
    draw = ImageDraw.Draw(sheet)
    for number, curve in enumerate(curves):
        _panel(draw, curve, HEIGHT * number, last, mark, axis)
    return sheet


def _panel(draw: ImageDraw.ImageDraw, curve: Curve, y: int, last: float, mark: int | None, axis: str) -> None:
    font = ImageFont.load_default(size=12)
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    low, high = min((v for _, v in points), default=0.0), max((v for _, v in points), default=1.0)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    top, bottom, right = y + TOP, y + HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low)
        return LEFT + (right - LEFT) * step / last, bottom - (bottom - top) * share

    draw.text((LEFT, y + 8), curve.title, fill=INK, font=font)
    draw.rectangle((LEFT, top, right, bottom), outline=GREY)
    for value in (low + margin, high - margin):
        height = place(0, value)[1]
        draw.line((LEFT - 4, height, LEFT, height), fill=INK)
        draw.text((LEFT - 8, height), f"{value:.4g}", fill=INK, font=font, anchor="rm")
    for step, anchor in ((0, "la"), (last, "ra")):
        draw.text((place(step, low)[0], bottom + 4), f"{axis} {step:g}", fill=INK, font=font, anchor=anchor)
    if mark is not None:
        x = place(mark, low)[0]
        draw.line((x, top, x, bottom), fill=MARK)
    places = [place(*point) for point in points]
    if len(places) > 1:
        draw.line(places, fill=LINE, width=2)
    for x, height in places[-1:]:
        draw.ellipse((x - 3, height - 3, x + 3, height + 3), fill=LINE)


LARGEST = 512


class SummaryImages(Callback):
    """Writes `learning_curve.png` and `progress.png` into the run folder at the end of the run or on an exception.

    The first shows what was measured of the deterministic loss (with its best step), the norm of the vectors and the
    learning rate. The second has one row per preview: the input images and the samples of their captions, or the
    sheet of the fixed prompts if the run has such prompts. At most `rows` previews are shown, evenly spaced.
    """

    def __init__(self, rows: int = 12) -> None:
        super().__init__()
        self.rows = max(2, rows)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.write(trainer)

    def write(self, trainer: pl.Trainer) -> None:
        """Write both images; a failure is a warning, because the run itself is complete."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        try:
            if curve := learning_curve(trainer):
                _save(curve, folder / "learning_curve.png")
            if sheet := progress_sheet(folder / "images" / "train", self.rows):
                _save(sheet, folder / "progress.png")
        except (OSError, ValueError) as error:
            logger.warning("no summary images: %s", error)


def learning_curve(trainer: pl.Trainer) -> Image.Image | None:
    """The curves of a run, or None if nothing was measured."""
    curves: list[Curve] = []
    best = None
    for callback in callbacks_of(trainer):
        if isinstance(callback, DeterministicLoss) and callback.losses:
            curves.insert(0, Curve("deterministic loss", callback.steps, callback.losses))
            best = callback.best_step
        elif isinstance(callback, VectorStats) and callback.rows:
            steps = [row.step for row in callback.rows]
            ratios = [row.norm_ratio for row in callback.rows]
            if all(map(math.isfinite, ratios)):
                curves.append(Curve("norm of the vectors / mean norm of the vocabulary", steps, ratios))
            curves.append(Curve("learning rate", steps, [row.learning_rate for row in callback.rows]))
    return draw_curves(curves, mark=best) if curves else None


def progress_sheet(folder: Path, rows: int) -> Image.Image | None:
    """Inputs and guided samples of the previews in a folder, a row per step; None if there are none.

    Sheets of fixed prompts are shown alone, two in a row, because they include the inputs.
    """
    sheets = sorted(folder.glob("prompts_gs-*.jpg"))
    found: dict[int, dict[str, Path]] = {}
    for path in sheets or folder.glob("samples_scaled_gs-*.jpg"):
        inputs = path.with_name(path.name.replace("samples_scaled", "inputs"))
        match = re.search(r"_gs-(\d+)", path.name)
        if match and inputs.is_file():
            step = int(match[1])
            found[step] = ({} if sheets else {"inputs": inputs}) | {f"step {step}": path}
    steps = sorted(found)
    if len(steps) > rows:
        steps = [steps[i * (len(steps) - 1) // (rows - 1)] for i in range(rows)]
    cells = []
    for step in steps:
        for text, path in found[step].items():
            with Image.open(path) as image:
                image.thumbnail((LARGEST, LARGEST))
                cells.append(labelled(image.convert("RGB"), text))
    return image_grid(cells, columns=2, padding=8) if cells else None


def _save(image: Image.Image, path: Path) -> None:
    # The default level of compression takes twice as long as this one, for a file of the same size.
    files.atomic_write(path, lambda file: image.save(file, "PNG", compress_level=4), sync=False)
