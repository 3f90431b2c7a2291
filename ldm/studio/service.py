"""What the page does, without the page: plan and check runs, generate with a model in memory, convert words."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldm import files
from ldm.base_models import recognise
from ldm.embeddings import FORMATS, merge, read, write, write_all
from ldm.embeddings.inspection import ConceptReport, inspect_concepts, known_folder, token_tables, words_of
from ldm.embeddings.method_files import MethodFile, read_words, triggers_of, write_method_file
from ldm.generate.images import SAMPLERS, ImageFolder, OutputError, Settings
from ldm.generate.session import WEIGHTS, Session, checkpoint_of
from ldm.images import enlarged, image_grid, labelled, open_image
from ldm.studio.queue import STATE_FOLDER, Job, Queue, train_command
from ldm.studio.workspace import Finding, Workspace, check_upload, check_yaml, findings
from ldm.training.inversion import Inversion
from ldm.training.record import RunRecord, runs_in
from ldm.training.run_folder import existing_run_folder
from ldm.util import UserError, best_device, free_memory
from ldm.words import check_word, file_stem
from ldm.yaml_files import in_checkout, parse_yaml, read_yaml

logger = logging.getLogger(__name__)

# Steps of the trial that a check makes, and the seconds that it may take.
TRIAL_STEPS, TRIAL_SECONDS = 6, 600
THUMBNAIL = 160
MOST_IMAGES = 64
AXES = ("nothing", "guidance", "steps", "seed", "word", "step of a run", "sampler")
# How a word is loaded elsewhere: tool, then the line with {file}, {name} and {word}.
LINES = {
    "this repository": 'python scripts/txt2img.py --embedding_path {file} --prompt "a photo of {word}"',
    "Python": 'ldm.generate("a photo of {word}", words="{file}")',
    "diffusers": 'pipeline.load_textual_inversion("{name}.safetensors", token="{word}")',
    "AUTOMATIC1111": "put {name}.safetensors into embeddings/ and write {name} in the prompt",
    "ComfyUI": "put {name}.safetensors into models/embeddings/ and write embedding:{name} in the prompt",
}


@dataclass(frozen=True)
class Checked:
    """What a trial of a few steps measured."""

    device: str
    seconds_per_step: float | None
    start_up: float
    memory: float
    steps: int | None

    def text(self) -> str:
        """The findings as one line; memory is the most that the process held, in GB."""
        parts = [f"ready to train on {self.device}", f"needs {self.memory:.1f} GB of memory"]
        if self.seconds_per_step:
            pace = self.seconds_per_step
            parts.append(f"{1 / pace:.1f} steps/s" if pace < 1 else f"{pace:.1f} s/step")
            if self.steps:
                minutes = (self.start_up + self.steps * pace) / 60
                parts.append(f"about {minutes:.0f} min" if minutes >= 2 else f"about {minutes * 60:.0f} s")
        return ", ".join(parts)


class Service:
    """The page's actions on one workspace; methods may be called from any thread.

    Every method raises UserError, with one line, for what a person can correct.
    """

    def __init__(self, workspace: Workspace, queue: Queue | None = None) -> None:
        self.workspace = workspace
        self.queue = queue or Queue(workspace.logs, workspace.root)
        self.queue.before_start = lambda device: self.drop()
        self._session: Session | None = None
        self._named: tuple[Any, ...] = ()
        self._busy = threading.Lock()
        self.stop_generating = threading.Event()

    # -- a run that is planned -----------------------------------------------------------------------------

    def inversion(self, form: dict[str, Any]) -> Inversion:
        """The run that a filled-in form describes; every path and word of it is checked."""
        work = self.workspace
        folder = str(form.get("folder") or "").strip()
        if not folder:
            raise UserError("drop images first, or name a folder with images")
        word = check_word(str(form.get("placeholder") or "").strip())
        words = {key: str(form.get(key) or "").strip() for key in ("name", "init", "model", "rate", "kind")}
        personalization = str(form.get("personalization") or "").strip()
        template = str(form.get("template_file") or "").strip()
        settings = _settings(str(form.get("settings") or ""))
        base = None
        if text := str(form.get("yaml") or "").strip():
            base = self._own_yaml(text)
        if work.confined:
            check_yaml(
                yaml.safe_load(f"[{', '.join(json.dumps(s.partition('=')[2]) for s in settings)}]"), work
            )
            if any("target" in setting for setting in settings):
                raise UserError("a target cannot be set on a page that others reach")
        recipe = str(form.get("recipe") or "").strip()
        if recipe and not recipe.isidentifier() and not recipe.replace("-", "_").isidentifier():
            recipe = str(work.path(recipe))
        return Inversion(
            images=work.shown(work.path(folder)),
            placeholder=word,
            init=words["init"] or None,
            model=self._model(words["model"]),
            base=base,
            recipes=(recipe,) if recipe and base is None else (),
            personalization=work.shown(work.path(in_checkout(personalization)))
            if personalization and base is None
            else None,
            vectors=_whole(form.get("vectors"), "the number of vectors", 1, 75),
            kind=words["kind"] or None,
            template_file=work.shown(work.path(template)) if template else None,
            use_captions=bool(form.get("use_captions")),
            flip=bool(form.get("flip", True)),
            steps=_whole(form.get("steps"), "steps", 1, 10**7),
            rate=words["rate"] or None,
            batch_size=_whole(form.get("batch_size"), "the batch size", 1, 4096),
            seed=_whole(form.get("seed"), "the seed", 0, 2**32 - 1),
            name=file_stem(words["name"] or word),
            logdir=work.shown(work.logs),
            settings=settings,
        )

    def _model(self, text: str) -> str:
        """A model as a person named it: a path that may be named, or a hub id."""
        text = text or WEIGHTS
        path = self.workspace.path(in_checkout(text))
        if not path.exists() and text.count("/") == 1 and not text.startswith((".", "~", "models/")):
            return text
        return self.workspace.shown(path)

    def _own_yaml(self, text: str) -> str:
        """A YAML that was edited on the page, in a file."""
        from omegaconf import OmegaConf

        content = OmegaConf.to_container(parse_yaml(text, "the YAML of the page"), resolve=False)
        if self.workspace.confined:
            check_yaml(content, self.workspace)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        path = self.workspace.logs / STATE_FOLDER / f"settings-{digest}.yaml"
        return self.workspace.shown(files.write_text(path, text))

    def arguments(self, form: dict[str, Any]) -> list[str]:
        """The words after main.py, with paths as seen from the root."""
        words = self.inversion(form).arguments()
        return [self.workspace.shown(word) if word.startswith("/") else word for word in words]

    def command(self, form: dict[str, Any]) -> str:
        """The command line that the page will run."""
        return shlex.join(["python", "main.py", *self.arguments(form)])

    def merged_yaml(self, form: dict[str, Any]) -> str:
        """All settings of the run, merged from its YAMLs and flags."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(self._merged(self.arguments(form | {"yaml": ""})))

    def _merged(self, words: Sequence[str]) -> Any:
        """The configuration of a command line."""
        from ldm.training import command_line, config

        options = command_line.parse(words)
        return config.load_run_config(options, [self.workspace.root / base for base in options.base])

    def tokens(self, model: str, text: str) -> list[str]:
        """The tokens of a text as the model's text encoder sees them."""
        if not text.strip():
            return []
        from omegaconf import OmegaConf
        from transformers import AutoTokenizer

        config = read_yaml(recognise(checkpoint_of(self._model(model))).finetune_config)
        params = OmegaConf.select(config, "model.params.cond_stage_config.params") or {}
        folder = known_folder(str(params.get("version") or "bert-base-uncased"))
        if folder is None:
            raise UserError(
                "the model's tokenizer is not on this machine yet; it is fetched when training begins"
            )
        pieces = AutoTokenizer.from_pretrained(folder).tokenize(text.strip())
        return [piece.replace("</w>", "") for piece in pieces]

    def check(self, form: dict[str, Any]) -> Checked:
        """Train a few steps in a folder that is removed again: on what device, how fast, with how much memory."""
        words = self.arguments(form)
        trainer = (self._merged(words).get("lightning") or {}).get("trainer") or {}
        steps = trainer.get("max_steps")
        trial = self.workspace.logs / STATE_FOLDER / f"trial-{time.time_ns()}"
        begun = time.monotonic()
        quick = ["-l", str(trial), "--max_train_steps", str(TRIAL_STEPS)]
        quick += ["lightning.callbacks.image_logger.params.max_images=0"]
        try:
            child = subprocess.run(
                [*train_command(), *words, *quick],
                cwd=self.workspace.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TRIAL_SECONDS,
            )
            if child.returncode:
                lines = child.stderr.strip().splitlines() or ["the check ended without a word"]
                said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                raise UserError((said or lines)[-1][:300])
            runs = runs_in(trial)
            pace = runs[0].rate if runs else None
            memory = runs[0].memory if runs else None
            return Checked(
                device=(runs[0].device or "cpu") if runs else "cpu",
                seconds_per_step=1 / pace if pace else None,
                start_up=time.monotonic() - begun,
                memory=memory or 0.0,
                steps=steps,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"the check took more than {TRIAL_SECONDS // 60} minutes and was ended") from None
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def start(self, form: dict[str, Any]) -> Job:
        """Queue the run of a form; it starts as soon as its device is free."""
        words = self.arguments(form)
        self.workspace.images(form["folder"])
        return self.queue.add(words, str(form.get("placeholder")), device())

    def resume(self, folder: str, steps: object = None) -> Job:
        """Queue a run to go on where it stopped, up to `steps` in all if that is given."""
        path = self.workspace.inside(self.workspace.logs, folder)
        existing_run_folder(path)
        record = RunRecord.read(path)
        if record.live:
            raise UserError(f"'{folder}' is trained already")
        words = ["-r", self.workspace.shown(path), "-t"]
        limit = _whole(steps, "the step to go on to", 1, 10**7)
        words += ["--max_steps", str(limit)] if limit else []
        return self.queue.add(
            words, ", ".join(record.words) or folder, record.device or device(), folder=path.name
        )

    # -- images --------------------------------------------------------------------------------------------

    def thumbnails(
        self, folder: str, size: int | None = None
    ) -> tuple[list[tuple[Image.Image, str]], list[Finding]]:
        """The images of a folder as training will see them, with their captions, and what is unusual about them."""
        captions = self.workspace.captions(folder)
        shown = []
        for path, caption in captions.items():
            try:
                image = open_image(path)
            except UserError:
                continue
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((THUMBNAIL, THUMBNAIL))
            shown.append((square, caption or path.name))
        return shown, list(findings(list(captions), size))

    # -- runs ----------------------------------------------------------------------------------------------

    def runs(self) -> list[RunRecord]:
        """All runs, those that go on first, then the newest."""
        return sorted(runs_in(self.workspace.logs), key=lambda run: not run.live)

    def run(self, name: str) -> RunRecord:
        """The run of a folder's name."""
        return RunRecord.read(self.workspace.inside(self.workspace.logs, name))

    def keep(self, run: str, step: int | str, name: str) -> Path:
        """Save the vectors of a step of a run as a concept in `embeddings`."""
        source = self.run(run).concepts().get(step)
        if source is None:
            raise UserError(f"step {step} of '{run}' has no saved vectors; the nearest saved one is offered")
        held = read_words(source)
        learned = held if isinstance(held, MethodFile) else held.without_progress()
        word = name.strip() or learned.triggers[0]
        if len(learned.triggers) == 1 and word != learned.triggers[0]:
            learned = learned.renamed({learned.triggers[0]: check_word(word)})
        stem, number = file_stem(word), 1
        suffix, format = (
            (".safetensors", "safetensors")
            if len(learned.triggers) == 1 or isinstance(learned, MethodFile)
            else (".pt", "original")
        )
        while (
            path := self.workspace.embeddings / f"{stem if number == 1 else f'{stem}-{number}'}{suffix}"
        ).exists():
            number += 1
        return (
            write_method_file(learned, path)
            if isinstance(learned, MethodFile)
            else write(learned, path, format)
        )

    def nearest_saved(self, run: RunRecord, step: int) -> int | None:
        """The step with saved vectors that is nearest to a step with a preview."""
        saved = [number for number in run.concepts() if isinstance(number, int)]
        return min(saved, key=lambda number: abs(number - step), default=None)

    # -- generation ----------------------------------------------------------------------------------------

    def session(self, model: str) -> Session:
        """The model for generation, which is loaded once; another one replaces it."""
        named = (self._model(model),)
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
        words = [self._word_file(file) for file in form.get("words") or []]
        count = _whole(form.get("count"), "the number of images", 1, MOST_IMAGES) or 1
        settings = _sampling(form)
        folder = ImageFolder(self.workspace.outputs, "png", 5)
        with self._busy:
            self.stop_generating.clear()
            try:
                images = self.session(str(form.get("model") or "")).generate(
                    str(form.get("prompt") or "").strip() or (),
                    words=words,
                    negative_prompt=str(form.get("negative_prompt") or "").strip(),
                    count=count,
                    progress=self._watched(progress),
                    **settings,
                )
            except RuntimeError as error:
                raise _as_user_error(error) from error
        return [(image, folder.save(image), image.info["parameters"]) for image in images]

    def grid(
        self,
        form: dict[str, Any],
        x: tuple[str, str],
        y: tuple[str, str],
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Image.Image, Path]:
        """An X/Y plot: for each pair of values one image, on one labelled sheet, which is saved too."""
        columns, rows = self._values(*x), self._values(*y)
        if len(columns) * len(rows) > MOST_IMAGES:
            raise UserError(
                f"the plot has {len(columns)} x {len(rows)} images; at most {MOST_IMAGES} are drawn"
            )
        cells, done = [], 0
        with self._busy:
            self.stop_generating.clear()
            for row in rows:
                for column in columns:
                    asked = self._changed(self._changed(form, x[0], column), y[0], row)
                    settings = _sampling(asked)
                    session = self.session(str(form.get("model") or ""))
                    try:
                        image = session.generate(
                            str(asked.get("prompt") or "").strip() or (),
                            words=[self._word_file(file) for file in asked.get("words") or []],
                            negative_prompt=str(form.get("negative_prompt") or "").strip(),
                            progress=self._watched(None),
                            **settings,
                        )[0]
                    except RuntimeError as error:
                        raise _as_user_error(error) from error
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
        sheet.info["parameters"] = Settings(
            prompt=str(form.get("prompt") or ""), steps=settings["steps"], sampler=settings["sampler"],
            scale=settings["scale"], seed=settings["seed"], labels={"X": f"{x[0]} {x[1]}", "Y": f"{y[0]} {y[1]}"},
        ).as_text()  # fmt: skip
        return sheet, ImageFolder(self.workspace.outputs, "png", 5).save(sheet)

    def _values(self, axis: str, text: str) -> list[str]:
        if axis not in AXES:
            raise UserError(f"an axis is '{axis}'; choose one of {', '.join(AXES)}")
        if axis == "nothing":
            return [""]
        values = [value.strip() for value in text.split(",") if value.strip()]
        if axis == "step of a run" and len(values) == 1 and not values[0].isdigit():
            run = self.run(values[0])
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
        keys = {"guidance": "scale", "steps": "steps", "seed": "seed", "sampler": "sampler"}
        if axis in keys:
            return form | {keys[axis]: value}
        if axis == "word":
            return form | {"prompt": str(form.get("prompt") or "").replace("{}", value)}
        if axis == "step of a run":
            run, _, step = value.rpartition(" ")
            source = self.run(run).concepts().get(int(step) if step.isdigit() else step)
            if source is None:
                raise UserError(f"'{run}' has no saved step {step}")
            return form | {"words": [self.workspace.shown(source)]}
        return form

    def _watched(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            if self.stop_generating.is_set():
                raise UserError("stopped")
            if progress is not None:
                progress(done, total)

        return step

    def _word_file(self, text: str) -> Path:
        path = self.workspace.path(text)
        if path.suffix.lower() not in (".pt", ".safetensors", ".bin", ".png", ".webp"):
            raise UserError(f"'{text}' is not an embedding file")
        return path

    # -- words ---------------------------------------------------------------------------------------------

    def take_word(self, source: Path) -> Path:
        """Copy an uploaded embedding file into `embeddings`, after reading it; code in it is never executed."""
        if source.stat().st_size > 2**24:
            raise UserError(f"'{source.name[:80]}' is larger than 16 MB, which no embedding file is")
        triggers_of(source)
        target = self.workspace.embeddings / f"{file_stem(source.stem)}{source.suffix.lower()}"
        with source.open("rb") as file:
            return files.atomic_write(target, lambda out: shutil.copyfileobj(file, out))

    def inspect(self, file: str, model: str = "") -> list[ConceptReport]:
        """Norms and nearest vocabulary words of the words in a file, by a model of the same width."""
        learned = read(self._word_file(file))
        ckpt = checkpoint_of(self.workspace.root / self._model(model))
        tables, words = None, None
        try:
            tables = token_tables(ckpt)
            folder = known_folder(str(Path(ckpt).parent / "text_encoder"))
            words = words_of(folder) if folder else None
        except UserError as error:
            logger.info("no vocabulary: %s", error)
        return inspect_concepts(learned, tables, words)

    def metadata(self, file: str) -> dict[str, Any]:
        """What a file says about how its words were learned."""
        return read(self._word_file(file)).metadata.known()

    def convert(self, sources: Sequence[str], format: str, word: str = "") -> list[Path]:
        """Write the words of one file, or several merged ones, in the format of a tool, renamed if `word` is given."""
        if format not in FORMATS:
            raise UserError(f"unknown format '{format}'; known are {', '.join(FORMATS)}")
        if not sources:
            raise UserError("choose a word in the table first")
        parts = [read(self._word_file(file)) for file in sources]
        learned = parts[0] if len(parts) == 1 else merge(parts, automatic=True)
        if word.strip():
            if len(learned.triggers) > 1:
                raise UserError(
                    f"the file holds {len(learned.triggers)} words; a new name fits one word only"
                )
            learned = learned.renamed({learned.triggers[0]: check_word(word.strip())})
        folder = self.workspace.outputs / "words"
        return write_all(learned, folder / f"{time.time_ns():x}", format)

    def lines(self, file: str, word: str) -> str:
        """How to load a word in this repository and in other tools."""
        name = file_stem(word)
        return "\n".join(
            f"# {tool}\n{line.format(file=file, name=name, word=word)}" for tool, line in LINES.items()
        )

    def settings_of(self, path: Path) -> Settings:
        """The settings in a dropped image."""
        check_upload(path)
        return Settings.from_image(path)


def device() -> str:
    """The device that a run of the page takes."""
    best = best_device()
    return "cuda:0" if best == "cuda" else best


def _sampling(form: dict[str, Any]) -> dict[str, Any]:
    sampler = str(form.get("sampler") or "ddim")
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; choose one of {', '.join(SAMPLERS)}")
    found: dict[str, Any] = {
        "sampler": sampler,
        "steps": _whole(form.get("steps"), "steps", 1, 1000) or 25,
        "scale": _real(form.get("scale"), "the guidance scale", -50, 50),
        "seed": _whole(form.get("seed"), "the seed", 0, 2**63 - 1) or 0,
    }
    for key in ("width", "height"):
        if size := _whole(form.get(key), key, 0, 4096):
            found[key] = size
    if form.get("number"):
        found["numbers"] = [_whole(form["number"], "the image number", 0, 10**6)]
    return found


def _settings(text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"the further settings cannot be read: {error}") from error
    for word in words:
        if not word.partition("=")[0].startswith(("model.", "data.", "lightning.")) or "=" not in word:
            raise UserError(f"'{word[:80]}' is not a setting; write model.params.key=value")
    return tuple(words)


def _whole(value: Any, name: str, least: int, most: int) -> int | None:
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


def _real(value: Any, name: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is '{str(value)[:40]}'; give a number") from None
    if not least <= number <= most:
        raise UserError(f"{name} is {value}; give a number from {least} to {most}")
    return number


def _as_user_error(error: RuntimeError) -> Exception:
    from ldm.training.fitting import is_out_of_memory

    if isinstance(error, OutputError) or not is_out_of_memory(error):
        return error
    return UserError("out of memory; try fewer images at once, a smaller size, or stop the run that trains")
