"""Two pictures of a whole run, made when it ends: its curves and its previews."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback

from ldm import files
from ldm.images import image_grid, labelled
from ldm.training.callbacks.deterministic_loss import DeterministicLoss
from ldm.training.callbacks.health import Health
from ldm.training.curve import Curve, draw_curves

logger = logging.getLogger(__name__)

LARGEST = 512


class SummaryPictures(Callback):
    """Writes `learning_curve.png` and `progress.png` into the run folder at its end, and when it breaks off.

    The first shows the deterministic loss with the best step, the vectors' norm and the rate, as far as they were
    measured. The second has a row for each preview: the inputs, and what the model made of the same captions, or of
    the fixed prompts where the run has such; of more than `rows` previews that many are taken, evenly.
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
        """Make both pictures out of what there is by now; a run never fails over them."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        try:
            if curve := learning_curve(trainer):
                _save(curve, folder / "learning_curve.png")
            if sheet := progress_sheet(folder / "images" / "train", self.rows):
                _save(sheet, folder / "progress.png")
        except (OSError, ValueError) as error:
            logger.warning("no summary pictures: %s", error)


def learning_curve(trainer: pl.Trainer) -> Image.Image | None:
    """The curves of a run, or None where nothing was measured."""
    curves, best = [], None
    for callback in trainer.callbacks:
        if isinstance(callback, DeterministicLoss) and callback.losses:
            curves.insert(0, Curve("deterministic loss", callback.steps, callback.losses))
            best = callback.best_step
        elif isinstance(callback, Health) and callback.rows:
            steps, ratios, _, rates = zip(*callback.rows, strict=True)
            curves.append(Curve("norm of the vectors / mean norm of the vocabulary", steps, ratios))
            curves.append(Curve("learning rate", steps, rates))
    return draw_curves(curves, mark=best) if curves else None


def progress_sheet(folder: Path, rows: int) -> Image.Image | None:
    """Inputs and guided samples of the previews in a folder, a row for each step, or None without any.

    Sheets of fixed prompts show their inputs themselves.
    """
    sheets = sorted(folder.glob("prompts_gs-*.jpg"))
    found: dict[int, dict[str, Path]] = {}
    for path in sheets or folder.glob("samples_scaled_gs-*.jpg"):
        inputs = path.with_name(path.name.replace("samples_scaled", "inputs"))
        step = re.search(r"_gs-(\d+)", path.name)
        if step and inputs.is_file():
            beside = {} if sheets else {"inputs": inputs}
            found[int(step[1])] = {**beside, f"step {int(step[1])}": path}
    steps = sorted(found)
    if len(steps) > rows:
        steps = [steps[i * (len(steps) - 1) // (rows - 1)] for i in range(rows)]
    cells = []
    for step in steps:
        for text, path in found[step].items():
            with Image.open(path) as picture:
                picture.thumbnail((LARGEST, LARGEST))
                cells.append(labelled(picture.convert("RGB"), text))
    return image_grid(cells, columns=3 if sheets else 2, padding=8) if cells else None


def _save(picture: Image.Image, path: Path) -> None:
    files.write_whole(path, lambda file: picture.save(file, "PNG"))
