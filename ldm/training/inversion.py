"""A word learned from a few images by one call: `ldm.invert`; the page builds its command lines by the same class."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pytorch_lightning as pl
import yaml
from PIL import Image
from torch import Tensor

from ldm import files
from ldm.base_models import training_yaml
from ldm.console import ConsoleHandler, Interrupted
from ldm.data.captions import CaptionFiles
from ldm.files import in_checkout
from ldm.generate.session import WEIGHTS, checkpoint_of
from ldm.images import MASK_ENDINGS, check_image_folder, mask_files, open_alpha, open_image, open_mask
from ldm.training import record
from ldm.training.callbacks.base import RunCallback
from ldm.training.concepts import Concept, concept_of_run, files_of_run
from ldm.training.flags import TEMPLATES
from ldm.training.record import RunRecord
from ldm.training.run_folder import existing_run_folder
from ldm.util import ConfigError, UserError, check_value, shown
from ldm.values import hint, misfits, plain
from ldm.words import check_word

logger = logging.getLogger(__name__)

Images: TypeAlias = "str | Path | Image.Image | Sequence[str | Path | Image.Image]"
Item = TypeVar("Item")
# A value for each of several words, or one for all.
OfWords: TypeAlias = Mapping[str, Item] | Item

# The folders of YAMLs that are named without their path, and one in each.
_FOLDERS = {
    "recipe": ("configs/recipes", "fast"),
    "personalization": ("configs/personalization", "one_vector"),
}
_YAML_END = "...\n"  # what the YAML of a single value ends with


@dataclass(frozen=True)
class Inversion:
    """What is to be learned, and how, as a command line of main.py.

    A field that is None leaves the YAML's value; those of several words are in the settings, see `settings_of_words`.
    `recipes` are names of files in configs/recipes, or paths of YAMLs;
    `personalization` is one of configs/personalization or a path;
    `rate` is a number or rates by steps ("0.005:100, 1e-3:1000"); `preview_every` is in steps; `settings` are further
    "dotted.key=value" words.
    """

    images: str | Path | None
    placeholder: str | None = None
    init: str | None = None
    model: str | Path = WEIGHTS
    base: str | Path | None = None
    recipes: tuple[str, ...] = ()
    personalization: str | Path | None = None
    vectors: int | None = None
    kind: str | None = None
    template_file: str | Path | None = None
    use_captions: bool = False
    flip: bool = True
    steps: int | None = None
    rate: float | str | None = None
    batch_size: int | None = None
    seed: int | None = None
    name: str | None = None
    logdir: str | Path = "logs"
    preview_every: int | None = None
    settings: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The words after `main.py`.

        Raises:
            UserError: there is no such model, recipe or kind.
        """
        ckpt = checkpoint_of(self.model)
        bases = [
            str(self.base or training_yaml(ckpt)),
            *(str(named_yaml(name, "recipe")) for name in self.recipes),
        ]
        if self.personalization:
            bases.append(str(named_yaml(self.personalization, "personalization")))
        words = ["--base", *bases, "-t", "--actual_resume", ckpt, "-l", str(self.logdir)]
        words += ["--data_root", str(self.images)] if self.images is not None else []
        words += ["--placeholder_string", self.placeholder] if self.placeholder is not None else []
        return [*words, *self.changes()]

    def changes(self) -> list[str]:
        """The words for the fields that change a YAML; beside `-r` those of a run.

        Raises:
            UserError: there is no such kind.
        """
        if self.kind is not None and self.kind not in TEMPLATES:
            raise UserError(f"kind is '{self.kind}'; choose object or style")
        train = "data.params.train.params"
        given: list[tuple[str, Any]] = [
            ("--init_word", self.init or None),
            ("--num_vectors", self.vectors),
            ("--learnable_property", self.kind),
            ("--max_train_steps", self.steps),
            ("--train_batch_size", self.batch_size),
            ("--seed", self.seed),
            ("-n", self.name),
        ]
        words = [word for flag, value in given if value is not None for word in (flag, str(value))]
        words += ["model.base_learning_rate=" + str(self.rate)] if self.rate not in (None, "") else []
        words += [f"{train}.template_file={self.template_file}"] if self.template_file else []
        words += [f"{train}.use_captions=true"] if self.use_captions else []
        words += [] if self.flip else [f"{train}.flip_p=0"]
        previews = "lightning.callbacks.image_logger.params.batch_frequency"
        words += [] if self.preview_every is None else [f"{previews}={self.preview_every}"]
        return [*words, *self.settings]


def named_yaml(name: str | Path, kind: str) -> Path:
    """The YAML of a "recipe" or "personalization" by its name or path.

    Raises:
        UserError: there is no such YAML; it lists the known names.
    """
    folder, any_of_them = _FOLDERS[kind]
    for place in (in_checkout(str(name)), in_checkout(f"{folder}/{name}.yaml"), f"{folder}/{name}.yaml"):
        if Path(place).is_file():
            return Path(place)
    home = Path(in_checkout(f"{folder}/{any_of_them}.yaml")).parent
    known = ", ".join(sorted(path.stem for path in home.glob("*.yaml")))
    raise ConfigError(f"there is no {kind} '{name}'; known are {known or 'none'}, or name a YAML")


class Stopped(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, or a notebook's stop button; what it learned is saved.

    Attributes:
        run: its folder, for `ldm.invert(resume=...)`; None before the first step.
        concept: what it had learned by then; None if that is nothing.
    """

    def __init__(self, run: Path | None, concept: Concept | None) -> None:
        self.run, self.concept = run, concept
        resume = f"go on with ldm.invert(resume={str(run)!r})"
        super().__init__(
            f"stopped and saved; {resume}" if run and concept else "stopped before the first step"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # as a process hands it to another
        return type(self), (self.run, self.concept)

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _Watcher(RunCallback):
    """Calls a function with the record of the run, at most once per interval, and when it ends."""

    def __init__(self, call: Callable[[RunRecord], object] | None) -> None:
        super().__init__()
        self.call = call
        self.folder: Path | None = None
        self._seen = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder = Path(trainer.default_root_dir)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.call is None or self.folder is None:
            return
        try:
            changed = (self.folder / record.STATUS).stat().st_mtime
        except OSError:
            return
        if changed != self._seen:
            self._seen = changed
            self.call(RunRecord.read(self.folder, own=True))


def invert(
    images: Images | Mapping[str, Images] | None = None,
    *,
    placeholder: str | None = None,
    init: OfWords[str] | None = None,
    vectors: OfWords[int] | None = None,
    model: str | Path = WEIGHTS,
    recipe: str | Sequence[str] = (),
    logdir: str | Path = "logs",
    settings: Mapping[str, Any] | None = None,
    on_progress: Callable[[RunRecord], object] | None = None,
    resume: str | Path | None = None,
    quiet: bool = True,
    **further: Any,
) -> Concept:
    """Learn a word, or several, from a few images of each; every weight of the model stays as it is.

    The run is one of main.py, with a folder in `logdir`. Ctrl-C (or the notebook's stop button) saves and raises
    `Stopped`, which has the concept as it is; `ldm.invert(resume=FOLDER)` goes on where it stopped.

    Args:
        images: a folder, or image files and `PIL` images, which are copied into `logdir`. For several words in one
            run, those of each: {"<cat>": "photos/cat", "<dog>": "photos/dog"}.
        placeholder: the new word, such as "<my-cat>"; by default the YAML's, which is "*" in those that ship.
        init: the text that the vectors start from; by default the YAML's. Of several words one for all, or of each:
            {"<cat>": "cat", "<dog>": "dog"}; a word without one begins at random.
        vectors: how many vectors a word has; of several words a number for all, or of each as for `init`.
        model: a checkpoint, or a folder with one; by default the embedded model.
        recipe: names from configs/recipes ("fast", "low-memory", ...), or paths of YAMLs.
        settings: any keys of the YAML, such as {"data.params.batch_size": 2}.
        on_progress: called about once a second with the `RunRecord`: step, total, curves(), plot(), previews().
        resume: a run folder that goes on; steps, rate and batch_size can change, the rest comes from its YAMLs.
        quiet: log warnings only, without a progress bar.
        further: fields of `Inversion`: kind, steps, rate, batch_size, preview_every, seed, name, base, ...

    Returns:
        the concept, with the vectors of the best step if the run measured one, else of the last.

    Raises:
        UserError: something is wrong with the images, the settings or the machine; nothing that was learned is lost.
        Stopped: it was interrupted, and saved; a KeyboardInterrupt.
    """
    from ldm.training.run import run

    known = list(Inversion.__dataclass_fields__)
    known[known.index("recipes")] = "recipe"
    if unknown := sorted(further.keys() - set(known)):
        raise UserError(f"invert has no argument '{unknown[0]}'; it has {', '.join(known)}")
    names = (recipe,) if isinstance(recipe, (str, Path)) else plain(recipe) or ()
    further = plain(further)
    check_value("resume", resume, "", str | None)
    _check_arguments(
        {"placeholder": placeholder, "model": model, "recipes": names, "logdir": logdir} | further
    )
    init, vectors = plain(init), plain(vectors)
    given = list(images) if isinstance(images, Mapping) else []
    several = [check_word(word, "a word of images") for word in given]
    for name, value in (("init", init), ("vectors", vectors)):
        _check_of_words(name, value, several)
    if on_progress is not None and not callable(on_progress):
        raise UserError(f"on_progress is {shown(on_progress)}; give a function of the run's record")
    if placeholder is not None:
        check_word(placeholder)
    names = tuple(names)
    if several and placeholder is not None:
        raise UserError(
            "placeholder and images of several words exclude each other: their keys are the words"
        )
    if len(set(several)) < len(several):
        raise UserError(f"images names '{shown(several[-1])}' or another word twice; give each word once")
    asked = Inversion(
        None,
        placeholder,
        None if several or isinstance(init, Mapping) else init,
        model,
        vectors=None if several or isinstance(vectors, Mapping) else vectors,
        recipes=names,
        logdir=logdir,
        settings=tuple(overrides(settings)),
        **further,
    )
    if resume is not None:
        if images is not None:
            raise UserError("images and resume exclude each other: a run goes on with its images")
        for name, value in {
            "recipe": names,
            "base": asked.base,
            "personalization": asked.personalization,
        }.items():
            if value:
                raise UserError(f"{name} and resume exclude each other: a run goes on with its own YAMLs")
        words = ["-r", str(resume), "-t", *asked.changes()]
        # The run says that these cannot change.
        words += ["--placeholder_string", placeholder] if placeholder is not None else []
        words += ["--actual_resume", checkpoint_of(model)] if model != WEIGHTS else []
    else:
        if isinstance(images, Mapping):
            if not several:
                raise UserError("images is empty; give the images of each word")
            folders = [copies_of(own, Path(logdir)) for own in images.values()]
            of_words = settings_of_words(
                dict(zip(several, (str(folder) for folder, _ in folders), strict=True)), init, vectors
            )
            asked = replace(asked, settings=(*of_words, *asked.settings))
        else:
            if images is None or (isinstance(images, str) and not images.strip()):
                raise UserError("give images: a folder, or a list of image files")
            folders = [copies_of(images, Path(logdir))]
            asked = replace(asked, images=folders[0][0])
        is_given = all(was_given for _, was_given in folders)
        words = [*asked.arguments(), *([] if is_given else ["--datadir_in_name", "false"])]
    watcher = _Watcher(on_progress)
    with _quiet(quiet):
        try:
            code = run(
                [*words, *(["lightning.trainer.enable_progress_bar=false"] if quiet else [])],
                "invert",
                [watcher],
            )
        except Interrupted as stop:
            raise Stopped(watcher.folder, None) from stop
    if watcher.folder is None and resume is None:
        raise UserError("the run did not train; quiet=False shows its messages")
    # A run that has all its steps does not train again.
    folder = watcher.folder or existing_run_folder(resume or "", logdir)[0].path
    if on_progress is not None:
        on_progress(RunRecord.read(folder, own=True))
    if code:
        raise Stopped(folder, concept_of_run(folder) if files_of_run(folder) else None)
    return concept_of_run(folder)


# Arguments whose range is that of a key of the YAML.
_RANGED = {
    "vectors": "num_vectors_per_token",
    "batch_size": "batch_size",
    "seed": "seed",
    "steps": "count",
    "preview_every": "batch_frequency",
}


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise UserError for an argument of `invert` whose type or range does not fit that field of `Inversion`."""
    for name, value in given.items():
        for label, misfit, requirement in misfits(name, value, hint(Inversion, name), _RANGED.get(name, "")):
            label = label.replace("recipes", "recipe")
            requirement = requirement.replace("null", "None")
            raise UserError(f"{label} is {shown(repr(misfit))}; it must be {requirement}")


def _check_of_words(name: str, value: Any, words: Sequence[str]) -> None:
    """Raise UserError for an argument of `invert` that is neither one value nor values of these words."""
    if not isinstance(value, Mapping):
        _check_arguments({name: value})
        return
    if not words:
        raise UserError(f"{name} is {shown(value)}; give one, or the images of each word too")
    for word, own in value.items():
        if word not in words:
            raise UserError(
                f"{name} names {shown(repr(word))}, and images has {', '.join(words)}; name one of these"
            )
        _check_arguments({name: own})


def settings_of_words(
    folders: Mapping[str, str], init: OfWords[str] | None = None, vectors: OfWords[int] | None = None
) -> list[str]:
    """The overrides for several words, each with its folder of images; None leaves the YAML's value."""

    def each(value: OfWords[Any]) -> list[Any]:
        return [value.get(word) if isinstance(value, Mapping) else value for word in folders]

    params = "model.params.personalization_config.params"
    given: dict[str, Any] = {"data_root": dict(folders), f"{params}.placeholder_strings": list(folders)}
    if init is not None:
        given[f"{params}.initializer_words"] = each(init)
    if vectors is not None:
        given[f"{params}.num_vectors_per_token"] = [count or 1 for count in each(vectors)]
    # A mapping would be merged with that of a YAML.
    return ["data_root=null", *overrides(given)]


def overrides(settings: Mapping[str, Any] | None) -> list[str]:
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(
            f'settings is {shown(settings)}; give a dictionary such as {{"data.params.batch_size": 2}}'
        )
    words = []
    for key, value in (settings or {}).items():
        try:
            text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6)
        except yaml.YAMLError as error:
            raise UserError(
                f"settings[{shown(repr(key))}] is {shown(value)}; give numbers, texts, lists or dictionaries"
            ) from error
        words.append(f"{key}={text.removesuffix(_YAML_END).strip()}")
    return words


def copies_of(images: Images, logdir: Path) -> tuple[Path, bool]:
    """The folder of the images, and whether it was given; image files and images are copied into one."""
    if isinstance(images, (str, Path)) and not os.path.isfile(images):
        folder = Path(in_checkout(str(images)))
        check_image_folder(folder)
        return folder, True
    is_list = isinstance(images, Iterable) and not isinstance(images, (str, Path, bytes, np.ndarray, Tensor))
    several: list[Any] = list(images) if is_list else [images]  # type: ignore[arg-type]
    if not several:
        raise UserError("the list of images is empty; three to five images are usual")
    copies = [open_image(one) for one in several]
    paths = [None if isinstance(one, Image.Image) else Path(one) for one in several]
    captions = CaptionFiles(path for path in paths if path is not None)
    texts = [None if path is None else captions.text(path) for path in paths]
    beside = mask_files([path for path in paths if path is not None])
    masks = [
        open_mask(beside[path]) if path in beside else open_alpha(one)
        for path, one in zip(paths, several, strict=True)
    ]
    parts = [image.tobytes() for image in copies] + [mask.tobytes() for mask in masks if mask is not None]
    digest = hashlib.sha256(b"".join(parts) + repr(texts).encode()).hexdigest()[:12]
    # Hidden, so that it is not taken for a run; named by its content, so that a second call finds it again.
    folder = logdir / ".images" / digest
    for number, (image, mask, text) in enumerate(zip(copies, masks, texts, strict=True), start=1):
        target = folder / f"{number:03}.png"
        for layer, file in ((image, target), (mask, target.with_stem(f"{target.stem}{MASK_ENDINGS[0]}"))):
            if layer is not None and not file.is_file():
                files.atomic_write(file, partial(layer.save, format="PNG"))
        if text is not None:
            files.write_text(target.with_suffix(".txt"), text)
    return folder, False


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Show the messages of `ldm`, or with `quiet` its warnings only, and none of Lightning's advice."""
    from lightning_fabric.utilities.warnings import PossibleUserWarning

    library, lightning = logging.getLogger("ldm"), logging.getLogger("pytorch_lightning")
    fabric = logging.getLogger("lightning_fabric")
    before = [(log, log.level, log.propagate) for log in (library, lightning, fabric)]
    levels = [(handler, handler.level) for handler in library.handlers]
    console = ConsoleHandler(logging.WARNING if quiet else logging.INFO)
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    # The log in the run folder has the messages too, so the library's level must not stop them.
    library.setLevel(logging.INFO)
    library.propagate = False
    library.addHandler(console)
    for log in (lightning, fabric):
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            yield
    finally:
        library.removeHandler(console)
        for log, level, propagate in before:
            log.level, log.propagate = level, propagate
            log.setLevel(level)
        for handler, level in levels:
            handler.setLevel(level)
