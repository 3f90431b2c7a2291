"""What the page does, without the page: plan and check runs, generate with a model in memory, convert words."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm import files
from ldm.base_models import recognise
from ldm.embeddings import FORMATS, merge, read, write, write_all
from ldm.embeddings.inspection import ConceptReport, inspect_concepts, known_folder, token_tables, words_of
from ldm.embeddings.method_files import MethodFile, read_words, triggers_of, write_method_file
from ldm.files import in_checkout
from ldm.generate.request import dial_text
from ldm.generate.session import checkpoint_of
from ldm.studio.generation import Generation, real, whole
from ldm.studio.queue import STATE_FOLDER, Job, Queue, environment, train_command
from ldm.studio.workspace import (
    Finding,
    Thumbnail,
    Workspace,
    check_yaml,
    findings,
    view,
)
from ldm.training.inversion import Inversion
from ldm.training.record import RunRecord, runs_in
from ldm.training.run_folder import existing_run_folder
from ldm.util import UserError, best_device
from ldm.words import check_word, file_stem, one_word, own_words
from ldm.yaml_files import parse_yaml, read_yaml

logger = logging.getLogger(__name__)

# Steps of the trial that a check makes, and the seconds that it may take.
TRIAL_STEPS, TRIAL_SECONDS = 6, 600
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


@dataclass(frozen=True)
class Plan:
    """What a filled-in form comes to; `about` says in a sentence what a chosen YAML does."""

    command: str = ""
    steps: str = ""
    rate: str = ""
    batch: str = ""
    mask_weight: str = ""
    vectors: int = 1
    size: int | None = None
    crop: bool = True
    about: tuple[str, ...] = ()


class Service:
    """The page's actions on one workspace; methods may be called from any thread.

    Every method raises UserError, with one line, for what a person can correct.
    """

    def __init__(self, workspace: Workspace, queue: Queue | None = None) -> None:
        self.workspace = workspace
        self.queue = queue or Queue(workspace.logs, workspace.root)
        self.generation = Generation(workspace)
        self.queue.before_start = lambda device: self.generation.drop()

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
        if personalization and isinstance(
            _setting(work.path(in_checkout(personalization)), "data_root"), Mapping
        ):
            raise UserError(
                f"'{personalization[:80]}' has words and image folders of its own; the page trains one word, so run it "
                "by main.py --base"
            )
        template = str(form.get("template_file") or "").strip()
        settings = _settings(str(form.get("settings") or ""))
        weight = real(form.get("mask_weight"), "the weight outside of masks", 0, 1)
        settings += () if weight is None else (f"data.params.train.params.mask_weight={weight:g}",)
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
            model=self.workspace.model(words["model"]),
            base=base,
            recipes=(recipe,) if recipe and base is None else (),
            personalization=work.shown(work.path(in_checkout(personalization)))
            if personalization and base is None
            else None,
            vectors=whole(form.get("vectors"), "the number of vectors", 1, 75),
            kind=words["kind"] or None,
            template_file=work.shown(work.path(template)) if template else None,
            use_captions=bool(form.get("use_captions")),
            flip=bool(form.get("flip", True)),
            steps=whole(form.get("steps"), "steps", 1, 10**7),
            rate=words["rate"] or None,
            batch_size=whole(form.get("batch_size"), "the batch size", 1, 4096),
            seed=whole(form.get("seed"), "the seed", 0, 2**32 - 1),
            name=file_stem(words["name"] or word),
            logdir=work.shown(work.logs),
            settings=settings,
        )

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

    def plan(self, form: dict[str, Any]) -> Plan:
        """What a filled-in form comes to: the command line that the page will run, and what its YAMLs decide."""
        from omegaconf import OmegaConf

        words = self.arguments(form)
        config = self._merged(words)

        def value(key: str, otherwise: Any = None) -> Any:
            found = OmegaConf.select(config, key)
            return otherwise if found is None else found

        vectors = value("model.params.personalization_config.params.num_vectors_per_token", 1)
        size = value("data.params.train.params.size")
        chosen = (
            form.get("recipe") and f"configs/recipes/{form['recipe']}.yaml",
            form.get("personalization"),
        )
        return Plan(
            command=shlex.join(["python", "main.py", *words]),
            steps=str(value("lightning.trainer.max_steps", "no end")),
            rate=str(value("model.base_learning_rate", "")),
            batch=str(value("data.params.batch_size", "")),
            mask_weight=str(value("data.params.train.params.mask_weight", "masks are ignored")),
            vectors=vectors if isinstance(vectors, int) else 1,
            size=size if isinstance(size, int) and size > 0 else None,
            crop=value("data.params.train.params.center_crop", True) is not False,
            about=tuple(filter(None, (_about(in_checkout(path)) for path in chosen if path))),
        )

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

        config = read_yaml(recognise(checkpoint_of(self.workspace.model(model))).finetune_config)
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
                env=environment(),
                text=True,
                timeout=TRIAL_SECONDS,
            )
            if child.returncode:
                lines = child.stderr.strip().splitlines() or ["the check ended without a message"]
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
        limit = whole(steps, "the step to go on to", 1, 10**7)
        words += ["--max_steps", str(limit)] if limit else []
        return self.queue.add(
            words, ", ".join(record.words) or folder, record.device or device(), folder=path.name
        )

    # -- images --------------------------------------------------------------------------------------------

    def thumbnails(self, form: dict[str, Any]) -> tuple[list[Thumbnail], list[Finding]]:
        """The images of a form's folder as its run will see them, and what is unusual about them."""
        captions = self.workspace.captions(form["folder"])
        try:
            plan = self.plan(form)
        except UserError:  # the form says what is wrong
            plan = Plan()
        found = list(findings(list(captions), plan.size))
        shown = []
        for path, caption in captions.items():
            if isinstance(caption, UserError):
                found.append(Finding(str(caption), bad=bool(form.get("use_captions"))))
                caption = ""
            try:
                address = view(path, path.stat().st_mtime_ns, plan.size, plan.crop)
            except (UserError, OSError):
                continue
            shown.append(Thumbnail(path.name, address, caption, plan.size))
        return shown, found

    # -- runs ----------------------------------------------------------------------------------------------

    def runs(self) -> list[RunRecord]:
        """All runs, those that go on first, then the newest."""
        return sorted(runs_in(self.workspace.logs), key=lambda run: not run.live)

    def keep(self, run: str, step: int | str, name: str) -> Path:
        """Save what a step of a run learned as a concept in `embeddings`."""
        source = self.workspace.run(run).concepts().get(step)
        if source is None:
            raise UserError(f"step {step} of '{run}' has no saved vectors; the nearest saved one is offered")
        learned = read_words(source)
        first = own_words(learned.triggers)[0]
        word = name.strip() or first
        if word != first:
            learned = learned.renamed({one_word(learned.triggers, f"'{run}'"): check_word(word)})
        if isinstance(learned, MethodFile):
            return write_method_file(learned, self._free_file(word, ".safetensors"))
        several = len(learned.triggers) > 1
        file = self._free_file(word, ".pt" if several else ".safetensors")
        return write(learned.without_progress(), file, "original" if several else "safetensors")

    def _free_file(self, word: str, suffix: str) -> Path:
        """A file in `embeddings` that is not there yet, named after a word."""
        stem = file_stem(word)
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        paths = (self.workspace.embeddings / f"{name}{suffix}" for name in names)
        return next(path for path in paths if not path.exists())

    def nearest_saved(self, run: RunRecord, step: int) -> int | None:
        """The step with saved vectors that is nearest to a step with a preview."""
        saved = [number for number in run.concepts() if isinstance(number, int)]
        return min(saved, key=lambda number: abs(number - step), default=None)

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
        learned = read(self.workspace.word_file(file))
        ckpt = checkpoint_of(self.workspace.root / self.workspace.model(model))
        tables, words = None, None
        try:
            tables = _tables(ckpt)
            folder = known_folder(str(Path(ckpt).parent / "text_encoder"))
            words = words_of(folder) if folder else None
        except UserError as error:
            logger.info("no vocabulary: %s", error)
        return inspect_concepts(learned, tables, words)

    def metadata(self, file: str) -> dict[str, Any]:
        """What a file says about how its words were learned."""
        return read_words(self.workspace.word_file(file)).metadata.known()

    def method(self, file: str) -> dict[str, Any]:
        """The method of a file of words that are more than vectors, with its options; empty for vectors."""
        found = read_words(self.workspace.word_file(file))
        return (
            {"method": found.method, **found.options, **found.dials} if isinstance(found, MethodFile) else {}
        )

    def dials(self, files: Sequence[str]) -> str:
        """The dials of the words in files with their values, as the form takes them; empty if there are none."""
        held = [read_words(self.workspace.word_file(file)) for file in files]
        return dial_text({k: v for one in held if isinstance(one, MethodFile) for k, v in one.dials.items()})

    def convert(self, sources: Sequence[str], format: str, word: str = "") -> list[Path]:
        """Write the words of one file, or several merged ones, in the format of a tool, renamed if `word` is given."""
        if format not in FORMATS:
            raise UserError(f"unknown format '{format}'; known are {', '.join(FORMATS)}")
        if not sources:
            raise UserError("choose a word in the table first")
        parts = [read(self.workspace.word_file(file)) for file in sources]
        learned = parts[0] if len(parts) == 1 else merge(parts, automatic=True)
        if word.strip():
            learned = learned.renamed({one_word(learned.triggers, "the choice"): check_word(word.strip())})
        folder = self.workspace.outputs / "words"
        return write_all(learned, folder / f"{time.time_ns():x}", format)

    def lines(self, file: str, word: str) -> str:
        """How to load a word in this repository and, if it is vectors, in other tools."""
        name = file_stem(word)
        tools = ("this repository", "Python") if self.method(file) else tuple(LINES)
        return "\n".join(f"# {tool}\n{LINES[tool].format(file=file, name=name, word=word)}" for tool in tools)


def device() -> str:
    """The device that a run of the page takes."""
    best = best_device()
    return "cuda:0" if best == "cuda" else best


@functools.lru_cache(maxsize=2)
def _tables(ckpt: str) -> dict[str, Tensor]:
    return token_tables(ckpt)


def _setting(yaml_file: Path, name: str) -> Any:
    """A value at the top of a YAML."""
    return read_yaml(yaml_file).get(name)


def _about(yaml_file: str) -> str:
    """The first sentences of a YAML's comment, which say what it does."""
    try:
        lines = Path(yaml_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    said = [
        line.removeprefix("#").strip()
        for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
    ]
    first = itertools.takewhile(lambda line: not line.startswith(("python ", "Use:", "Then:")), said)
    return " ".join(first).partition("; lay it over")[0].replace("`", "")


def _settings(text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"the further settings cannot be read: {error}") from error
    for word in words:
        if not word.partition("=")[0].startswith(("model.", "data.", "lightning.")) or "=" not in word:
            raise UserError(f"'{word[:80]}' is not a setting; write model.params.key=value")
    return tuple(words)
