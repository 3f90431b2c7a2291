"""What a run writes about itself into its folder while it goes on, and the reading of it from another process.

`status.json` says how far the run is, `run.log` what it said, `csv/*/metrics.csv` holds its curves. A page, a notebook
or a script reads them with `RunRecord`, for runs of any start, going on or past.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image

from ldm import files
from ldm.console import Interrupted
from ldm.training import run_folder
from ldm.training.callbacks.base import RunCallback, datasets_of, loss_of, personalization_of
from ldm.training.callbacks.progress import duration, total_steps
from ldm.training.callbacks.summary_images import Curve, draw_curves
from ldm.util import UserError

STATUS, LOG = "status.json", "run.log"
# Seconds between two writings of the status, and the number of recent steps that the pace is measured over.
INTERVAL, RECENT = 1.0, 20
_MOST_WARNINGS = 20


class Recorder(RunCallback):
    """Writes `status.json` and `run.log` into the run folder.

    Nothing is written before the run holds the lock of its folder: what it said until then is kept in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None
        self.status: dict[str, Any] = {"state": "starting", "step": 0, "warnings": []}
        self._pace: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._written = 0.0
        self._handler = _FolderLog(self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        manager = personalization_of(pl_module)
        data = datasets_of(trainer).get("train")
        self.folder = Path(trainer.default_root_dir)
        self.status |= {
            "words": dict(manager.placeholders) if manager is not None else {},
            "images": getattr(data, "num_images", None),
            "image_folder": next((str(path.parent) for path in getattr(data, "image_paths", ())), None),
            "device": str(trainer.strategy.root_device),
            "started": time.time(),
        }
        self._write()
        self._handler.open(self.folder / LOG)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.status |= {"state": "training", "total": total_steps(trainer), "step": trainer.global_step}
        self._pace.append((time.monotonic(), trainer.global_step))
        self._write()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._written < INTERVAL:
            return
        loss = loss_of(outputs)
        self._pace.append((now, trainer.global_step))
        self.status |= {
            "step": trainer.global_step,
            "loss": None if loss is None else float(loss.detach().float().mean()),
            "rate": self._rate(),
        }
        self._write()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._last(trainer)

    def end(self, state: str, message: str | None) -> None:
        """Write how the run ended: "finished", "stopped" or "failed", and the verdict or the error."""
        self.status |= {"state": state, "message": message, "ended": time.time()}
        self._write()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the messages of this block, and an error that ends it."""
        library = logging.getLogger("ldm")
        library.addHandler(self._handler)
        try:
            yield
        except UserError as error:
            self._handler.write("error", str(error))
            self.end("failed", str(error))
            raise
        except (KeyboardInterrupt, Interrupted):
            self.end("stopped", "it was interrupted")
            raise
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._handler.write("error", text)
            self.end("failed", text)
            raise
        finally:
            library.removeHandler(self._handler)
            self._handler.close()

    def _last(self, trainer: pl.Trainer) -> None:
        self._pace.append((time.monotonic(), trainer.global_step))
        self.status |= {"step": trainer.global_step, "rate": self._rate(), "memory": _memory()}
        self._write()

    def _rate(self) -> float | None:
        (start, first), (now, step) = self._pace[0], self._pace[-1]
        return (step - first) / (now - start) if now > start else None

    def _write(self) -> None:
        if self.folder is None:
            return
        self._written = time.monotonic()
        # The training goes on if this small file cannot be written; the state file reports a full disk.
        try:
            text = json.dumps(self.status | {"updated": time.time()})
            files.write_text(self.folder / STATUS, text, sync=False)  # every second
        except UserError:
            logging.getLogger(__name__).debug("%s cannot be written", self.folder / STATUS)


class _FolderLog(logging.Handler):
    """Appends messages to a file that is opened later than the first of them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(logging.INFO)
        self.recorder = recorder
        self._waiting: list[str] = []
        self._path: Path | None = None

    def open(self, path: Path) -> None:
        self._path = path
        waiting, self._waiting = self._waiting, []
        self._append("".join(waiting))

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        warning = record.levelno >= logging.WARNING
        if warning:
            kept = self.recorder.status["warnings"]
            self.recorder.status["warnings"] = [*kept[1 - _MOST_WARNINGS :], message[:500]]
        self.write("warning" if warning else "", message)

    def write(self, kind: str, message: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        line = f"{stamp} {f'{kind}: ' if kind else ''}{message}\n"
        if self._path is None:
            self._waiting.append(line)
        else:
            self._append(line)

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:  # type: ignore[union-attr]
                file.write(text)
        except OSError:  # a full disk or a vanished folder is reported by what saves the state
            return


CURVES = {
    "val/loss_deterministic": "fixed loss",
    "vectors/norm_ratio": "norm",
    "vectors/cosine_to_initial": "cosine to the initial vectors",
    "train/loss": "loss",
}
# The names of previews, best first.
_PREVIEWS = ("prompts", "samples_scaled", "samples")


@dataclass(frozen=True)
class RunRecord:
    """A run folder as its files describe it; reading one never fails, because any of them may be missing.

    Attributes:
        state: "training", "finished", "stopped", "failed", "lost" (it ended without writing a result: it was
            killed, or the machine was switched off), or "unknown" for a run of a version that wrote no status.
        rate: steps per second; None before it is known.
        memory: the most that its process held, in GB; known at the end.
        message: the verdict, or the error as one line.
        words: the placeholders with their numbers of vectors.
    """

    folder: Path
    state: str = "unknown"
    step: int = 0
    total: int | None = None
    rate: float | None = None
    loss: float | None = None
    message: str | None = None
    words: Mapping[str, int] = field(default_factory=dict)
    images: int | None = None
    image_folder: str | None = None
    device: str | None = None
    memory: float | None = None
    started: float = 0.0
    updated: float = 0.0
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str | Path, *, own: bool = False) -> RunRecord:
        """Read the status of a run folder.

        `own` says that the run is one of this process: then its lock is not looked at, because closing that file would
        release the lock.
        """
        folder = Path(folder)
        found = _read_status(folder / STATUS)
        state = str(found.get("state") or "unknown")
        if not own and state not in ("finished", "failed"):
            live = run_folder.holder(folder) is not None
            state = (
                ("training" if state in ("unknown", "stopped") else state)
                if live
                else ("unknown" if state == "unknown" else "stopped" if state == "stopped" else "lost")
            )
        elif not own and run_folder.holder(folder) is not None:
            state = "training"  # it was resumed, and has not written its status yet
        step = _whole(found.get("step"))
        if not found:
            saved = [
                int(m[1])
                for p in folder.glob("checkpoints/embeddings_gs-*.pt")
                if (m := _STEP.search(p.name))
            ]
            step = max(saved, default=0)
        words = found.get("words")
        message = found.get("message")
        if state == "lost":
            message = (
                "it ended without writing a result: it was killed, or the machine was switched off; resume it"
            )
        return cls(
            folder=folder,
            state=state,
            step=step,
            total=_whole(found.get("total")) or None,
            rate=_real(found.get("rate")),
            loss=_real(found.get("loss")),
            message=None if message is None else str(message),
            words={str(k): _whole(v) for k, v in words.items()} if isinstance(words, dict) else {},
            images=_whole(found.get("images")) or None,
            image_folder=found.get("image_folder"),
            device=found.get("device"),
            memory=_real(found.get("memory")),
            started=_real(found.get("started")) or _modified(folder),
            updated=_real(found.get("updated")) or _modified(folder),
            warnings=tuple(map(str, found.get("warnings") or ())),
        )

    @property
    def live(self) -> bool:
        """Whether a process is working on it now."""
        return self.state in ("starting", "training")

    @property
    def seconds_left(self) -> float | None:
        """The time until the last step at the present pace."""
        if not self.live or not self.rate or not self.total:
            return None
        return max(self.total - self.step, 0) / self.rate

    def __str__(self) -> str:
        facts = [f"step {self.step}" + (f" of {self.total}" if self.total else "")]
        if self.rate:
            facts.append(f"{self.rate:.1f} steps/s" if self.rate >= 1 else f"{1 / self.rate:.1f} s/step")
        if self.seconds_left is not None:
            facts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(facts) if self.live else f"{self.state} at {facts[0]}"

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """The (step, value) pairs of each curve of `CURVES`, in order; where starts overlap, the later one counts."""
        found: dict[str, dict[int, float]] = {}
        for path in sorted(self.folder.glob("csv/*/metrics.csv")):
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    for row in csv.DictReader(file):
                        step = _real(row.get("step"))
                        for key, name in CURVES.items():
                            value = _real(row.get(key))
                            if step is not None and value is not None:
                                found.setdefault(name, {})[int(step)] = value
            except (OSError, csv.Error, UnicodeDecodeError):
                continue
        return {name: sorted(found[name].items()) for name in CURVES.values() if name in found}

    def plot(self) -> Image.Image | None:
        """The fixed loss and the norm as an image, with the best step so far; None before they are measured."""
        found = self.curves()
        losses = found.get("fixed loss", [])
        finite = [(value, step) for step, value in losses if math.isfinite(value)]
        curves = [
            Curve(name, *zip(*found[name], strict=True)) for name in ("fixed loss", "norm") if name in found
        ]
        return draw_curves(curves, min(finite)[1] if finite else None) if curves else None

    def previews(self) -> list[tuple[int, Path]]:
        """The (step, image file) pairs of the previews, in order."""
        folder = self.folder / "images" / "train"
        for name in _PREVIEWS:
            steps = {int(m[1]): p for p in folder.glob(f"{name}_gs-*.jpg") if (m := _STEP.search(p.name))}
            if steps:
                return sorted(steps.items())
        return []

    def concepts(self) -> dict[int | str, Path]:
        """The embedding files of the run: by step, and "best" and "last"."""
        folder = self.folder / "checkpoints"
        found: dict[int | str, Path] = {
            int(m[1]): p for p in folder.glob("embeddings_gs-*.pt") if (m := _STEP.search(p.name))
        }
        found = dict(sorted(found.items(), key=lambda item: int(item[0])))
        for name, file in (("best", "embeddings_best.pt"), ("last", "embeddings.pt")):
            if (folder / file).is_file():
                found[name] = folder / file
        return found

    def log(self, lines: int = 200) -> str:
        """The end of what the run said."""
        try:
            with (self.folder / LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 64_000))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


_STEP = re.compile(r"_gs-0*(\d+)")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / STATUS).is_file() or (folder / "checkpoints").is_dir() or (folder / "configs").is_dir()


def runs_in(logdir: str | Path) -> list[RunRecord]:
    """All runs directly in a folder, the newest first."""
    try:
        folders = [path for path in Path(logdir).iterdir() if not path.name.startswith(".") and is_run(path)]
    except OSError:
        return []
    return sorted((RunRecord.read(path) for path in folders), key=lambda run: run.started, reverse=True)


def _memory() -> float | None:
    """The most memory that this process held, in GB: of the GPU where it trains on one."""
    if torch.cuda.is_available() and (most := torch.cuda.max_memory_reserved()):
        return most / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _read_status(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _real(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int:
    number = _real(value)
    return 0 if number is None else int(number)


def _modified(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
