"""Images of the page: one model in memory, images of a form, and X/Y plots."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.generate.editing import InitImage
from ldm.generate.images import SAMPLERS, ImageFolder, OutputError, Settings
from ldm.generate.session import Session
from ldm.images import enlarged, image_grid, labelled
from ldm.studio.workspace import THUMBNAIL, Workspace, check_upload
from ldm.util import UserError, free_memory
from ldm.values import named_number

MOST_IMAGES = 64
# The axes of a plot that are fields of the form.
_FIELDS = {
    "guidance": "scale",
    "steps": "steps",
    "seed": "seed",
    "sampler": "sampler",
    "strength of the word": "concept_strength",
    "change of the image": "strength",
}
AXES = ("nothing", "word", "step of a run", *_FIELDS, "dial")


class Generation:
    """The model for generation of one workspace; methods may be called from any thread.

    Every method raises UserError, with one line, for what a person can correct.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._session: Session | None = None
        self._named: tuple[Any, ...] = ()
        self._busy = threading.Lock()
        self.stop = threading.Event()

    def session(self, model: str) -> Session:
        """The model for generation, which is loaded once; another one replaces it."""
        named = (self.workspace.model(model),)
        if self._session is None or self._named != named:
            self.drop()
            path = named[0] if "/" in named[0] and not (self.workspace.root / named[0]).exists() else str(
                self.workspace.root / named[0]
            )  # fmt: skip
            self._session, self._named = Session(path), named
        return self._session

    def drop(self) -> None:
        """Free the memory of the model for generation."""
        if self._session is None:
            return
        self._session, self._named = None, ()
        import gc

        gc.collect()
        free_memory()

    def generate(
        self,
        form: dict[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Image.Image, Path, str]]:
        """Generate and save the images of a form; each with its file and the text of its settings."""
        count = whole(form.get("count"), "the number of images", 1, MOST_IMAGES) or 1
        folder = ImageFolder(self.workspace.outputs, "png", 5)
        with self._busy:
            self.stop.clear()
            images = self._drawn(form, count, progress)
        return [(image, folder.save(image), image.info["parameters"]) for image in images]

    def _drawn(
        self, form: dict[str, Any], count: int, progress: Callable[[int, int], None] | None
    ) -> list[Image.Image]:
        """Images of a form; its fields are checked before the model is loaded."""
        words = [self.workspace.word_file(file) for file in form.get("words") or []]
        settings = _sampling(form, count) | _strength(form) | self._edit(form)
        try:
            return self.session(str(form.get("model") or "")).generate(
                str(form.get("prompt") or "").strip() or (),
                words=words,
                negative_prompt=str(form.get("negative_prompt") or "").strip(),
                count=count,
                progress=self._watched(progress),
                **settings,
            )
        except RuntimeError as error:
            raise _as_user_error(error) from error

    def _edit(self, form: dict[str, Any]) -> dict[str, InitImage]:
        """The image that a form begins from, if any."""
        image, mask = (str(form.get(key) or "").strip() for key in ("init_img", "mask"))
        if mask and not image:
            raise UserError("there is a mask and no image to edit; drop the image too, or remove the mask")
        if not image:
            return {}
        paths = [self.workspace.path(text) for text in (image, mask) if text]
        for path in paths:
            if path.is_file():  # who reads it says what is missing
                check_upload(path)
        strength = real(form.get("strength"), "the change of the image", 0, 1)
        further = {} if strength is None else {"strength": strength}
        return {"init": InitImage.read(paths[0], paths[1] if mask else None, **further)}

    def grid(
        self,
        form: dict[str, Any],
        x: tuple[str, str],
        y: tuple[str, str],
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Image.Image, Path]:
        """An X/Y plot: for each pair of values one image, on one labelled sheet, which is saved too.

        The settings of the sheet are those of its last image, with the prompt of the form.
        """
        columns, rows = self._values(*x), self._values(*y)
        if "change of the image" in (x[0], y[0]) and not form.get("init_img"):
            raise UserError("the axis 'change of the image' needs an image to begin from; drop one")
        if len(columns) * len(rows) > MOST_IMAGES:
            raise UserError(
                f"the plot has {len(columns)} x {len(rows)} images; at most {MOST_IMAGES} are drawn"
            )
        cells, done = [], 0
        with self._busy:
            self.stop.clear()
            for row in rows:
                for column in columns:
                    asked = self._changed(self._changed(form, x[0], column), y[0], row)
                    image = self._drawn(asked, 1, None)[0]
                    done += 1
                    if progress is not None:
                        progress(done, len(rows) * len(columns))
                    large = enlarged(image, max(1, -(-THUMBNAIL // image.width)))
                    names = [
                        f"{axis} {value}"
                        for axis, value in ((x[0], column), (y[0], row))
                        if axis != "nothing"
                    ]
                    cells.append(labelled(large, ", ".join(names) or "the prompt"))
        sheet = image_grid(cells, columns=len(columns), padding=6)
        last = Settings.from_text(image.info["parameters"])
        labels = {**last.labels, "X": f"{x[0]} {x[1]}", "Y": f"{y[0]} {y[1]}"}
        sheet.info["parameters"] = replace(
            last, prompt=str(form.get("prompt") or ""), labels=labels
        ).as_text()
        return sheet, ImageFolder(self.workspace.outputs, "png", 5).save(sheet)

    def _values(self, axis: str, text: str) -> list[str]:
        if axis not in AXES:
            raise UserError(f"an axis is '{axis}'; choose one of {', '.join(AXES)}")
        if axis == "nothing":
            return [""]
        values = [value.strip() for value in text.split(",") if value.strip()]
        if axis == "step of a run" and len(values) == 1 and not values[0].isdigit():
            run = self.workspace.run(values[0])
            steps = [step for step in run.concepts() if isinstance(step, int)]
            return [f"{values[0]} {step}" for step in steps[:: max(1, len(steps) // 8)]] or self._none(
                values[0]
            )
        if not values:
            raise UserError(f"the axis '{axis}' needs values, separated by commas")
        return values

    @staticmethod
    def _none(run: str) -> list[str]:
        raise UserError(f"'{run}' has no saved steps yet")

    def _changed(self, form: dict[str, Any], axis: str, value: str) -> dict[str, Any]:
        if axis in _FIELDS:
            return form | {_FIELDS[axis]: value}
        if axis == "dial":
            return form | {"dials": f"{form.get('dials') or ''}, {value}"}
        if axis == "word":
            return form | {"prompt": str(form.get("prompt") or "").replace("{}", value)}
        if axis == "step of a run":
            run, _, step = value.rpartition(" ")
            source = self.workspace.run(run).concepts().get(int(step) if step.isdigit() else step)
            if source is None:
                raise UserError(f"'{run}' has no saved step {step}")
            return form | {"words": [self.workspace.shown(source)]}
        return form

    def _watched(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            if self.stop.is_set():
                raise UserError("stopped")
            if progress is not None:
                progress(done, total)

        return step

    def settings_of(self, path: Path) -> Settings:
        """The settings in a dropped image."""
        check_upload(path)
        return Settings.from_image(path)


def _sampling(form: dict[str, Any], count: int) -> dict[str, Any]:
    sampler = str(form.get("sampler") or "ddim")
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; choose one of {', '.join(SAMPLERS)}")
    found: dict[str, Any] = {
        "sampler": sampler,
        "steps": whole(form.get("steps"), "steps", 1, 1000) or 25,
        "seed": whole(form.get("seed"), "the seed", 0, 2**63 - 1) or 0,
    }
    if (scale := real(form.get("scale"), "the guidance scale", -50, 50)) is not None:
        found["scale"] = scale
    for key in ("width", "height"):
        if size := whole(form.get(key), key, 0, 4096):
            found[key] = size
    if (first := whole(form.get("number"), "the image number", 0, 10**6)) is not None:
        found["numbers"] = range(first, first + count)
    return found


def whole(value: Any, name: str, least: int, most: int) -> int | None:
    """A whole number that a field holds, None for an empty one; UserError for what is none, or is out of range."""
    if value is None or str(value).strip() == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if number != int(number) if abs(number) < 2**63 else True:
        raise UserError(f"{name} is '{str(value)[:40]}'; give a whole number from {least} to {most}")
    if not least <= int(number) <= most:
        raise UserError(f"{name} is {int(number)}; give a whole number from {least} to {most}")
    return int(number)


def _strength(form: dict[str, Any]) -> dict[str, Any]:
    """How much the words of a form add to their class words, and the dials of words of a method."""
    strength = real(form.get("concept_strength"), "the strength of the word", 0, 10)
    text = str(form.get("class_word") or "").strip()
    pairs = re.split(r"\s*,\s*|\s+(?=[^\s=]+\s*=)", str(form.get("dials") or "").strip())
    return {
        "concept_strength": 1.0 if strength is None else strength,
        # A comma begins the next of several PLACEHOLDER=WORD; a class word may hold commas of its own.
        "class_words": re.split(r"\s*,\s*(?=[^,=]+=)", text) if text else None,
        "dials": dict(map(named_number, filter(None, pairs))),
    }


def real(value: Any, name: str, least: float, most: float) -> float | None:
    """A number that a field holds, None for an empty one; UserError for what is none, or is out of range."""
    if value is None or str(value).strip() == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is '{str(value)[:40]}'; give a number from {least} to {most}") from None
    if not least <= number <= most:
        raise UserError(f"{name} is {number:g}; give a number from {least} to {most}")
    return number


def _as_user_error(error: RuntimeError) -> Exception:
    from ldm.training.fitting import is_out_of_memory

    if isinstance(error, OutputError) or not is_out_of_memory(error):
        return error
    return UserError("out of memory; try fewer images at once, a smaller size, or stop the run that trains")
