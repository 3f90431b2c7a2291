"""A word learned from a few images by one call: `ldm.invert`; the page builds its command lines by the same class."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
import yaml
from PIL import Image
from torch import Tensor

from ldm import files
from ldm.console import Interrupted
from ldm.embeddings import DEFAULT_FORMAT, LearnedEmbeddings, read, write
from ldm.embeddings import Concept as ConceptVectors
from ldm.generate.session import WEIGHTS, checkpoint_of
from ldm.images import open_image
from ldm.training import record
from ldm.training.callbacks.base import RunCallback
from ldm.training.config import training_yaml
from ldm.training.record import RunRecord
from ldm.util import ConfigError, UserError
from ldm.words import file_stem
from ldm.yaml_files import in_checkout

logger = logging.getLogger(__name__)

Images: TypeAlias = "str | Path | Image.Image | Sequence[str | Path | Image.Image]"

RECIPES = "configs/recipes"
_YAML_END = "...\n"  # what the YAML of a single value ends with
KINDS = {
    "object": "ldm.data.personalized.PersonalizedBase",
    "style": "ldm.data.personalized_style.PersonalizedBase",
}


@dataclass(frozen=True)
class Inversion:
    """What is to be learned, and how, as a command line of main.py.

    A field that is None leaves the YAML's value. `recipes` are names of files in configs/recipes, or paths of YAMLs;
    `rate` is a number or rates by steps ("0.005:100, 1e-3:1000"); `settings` are further "dotted.key=value" words.
    """

    images: str | Path
    placeholder: str = "*"
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
    settings: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The words after `main.py`.

        Raises:
            UserError: there is no such model, recipe or kind.
        """
        ckpt = checkpoint_of(self.model)
        bases = [str(self.base or training_yaml(ckpt)), *(str(recipe_yaml(name)) for name in self.recipes)]
        bases += [str(self.personalization)] if self.personalization else []
        words = ["--base", *bases, "-t", "--actual_resume", ckpt, "--data_root", str(self.images)]
        words += ["--placeholder_string", self.placeholder, "-l", str(self.logdir)]
        if self.kind is not None and self.kind not in KINDS:
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
        words += [word for flag, value in given if value is not None for word in (flag, str(value))]
        words += ["model.base_learning_rate=" + str(self.rate)] if self.rate not in (None, "") else []
        words += [f"{train}.template_file={self.template_file}"] if self.template_file else []
        words += [f"{train}.use_captions=true"] if self.use_captions else []
        words += [] if self.flip else [f"{train}.flip_p=0"]
        return [*words, *self.settings]


def recipe_yaml(name: str) -> Path:
    """The YAML of a recipe by its name or path.

    Raises:
        UserError: there is no such recipe; it lists the known ones.
    """
    for place in (name, in_checkout(f"{RECIPES}/{name}.yaml"), f"{RECIPES}/{name}.yaml"):
        if Path(place).is_file():
            return Path(place)
    known = ", ".join(
        sorted(path.stem for path in Path(in_checkout(f"{RECIPES}/fast.yaml")).parent.glob("*.yaml"))
    )
    raise ConfigError(f"there is no recipe '{name}'; known are {known or 'none'}, or name a YAML")


@dataclass(frozen=True, eq=False)
class Concept:
    """A learned word: its vectors, the file they are in, and the run that they come from.

    `ldm.generate(..., words=concept)` uses it.
    """

    embeddings: LearnedEmbeddings
    path: Path | None = None
    run: Path | None = None

    @property
    def word(self) -> str:
        """The placeholder to write in prompts; the first, if there are several."""
        return self.embeddings.triggers[0]

    @property
    def vectors(self) -> Tensor:
        """The vectors [N, d] of the word, float32 on the CPU."""
        return self.embeddings.concepts[0].vectors

    @property
    def record(self) -> RunRecord | None:
        """The curves, previews and verdict of its run."""
        return None if self.run is None else RunRecord.read(self.run, own=True)

    def renamed(self, word: str) -> Concept:
        """The same vectors for another word."""
        return replace(self, embeddings=self.embeddings.renamed({self.word: word}), path=None)

    def save(self, path: str | Path | None = None, format: str = DEFAULT_FORMAT) -> Path:
        """Write a file in the format of a tool (a key of `ldm.embeddings.FORMATS`), by default WORD.safetensors here.

        Raises:
            UserError: the format is unknown or cannot hold the vectors, or the file cannot be written.
        """
        return write(self.embeddings, path or f"{file_stem(self.word)}.safetensors", format)

    def __repr__(self) -> str:
        count, width = self.vectors.shape
        return f"<Concept {self.word!r}: {count} vector{'s' * (count > 1)} of width {width}>"


def load(source: str | Path) -> Concept:
    """Load a learned word from a file of any tool, or from a repository "owner/name" on the Hugging Face hub.

    Raises:
        UserError: there is no such file or repository, or it holds no embedding.
    """
    path = Path(in_checkout(str(source)))
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        path = _from_hub(str(source))
    if path.is_dir():
        return _of_run(path)
    return Concept(read(path), path)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.bin", "*.safetensors", "*.pt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"'{name}' is neither a file nor a repository that the hub gives ({type(error).__name__}); check the name"
        ) from error
    found = sorted(path for suffix in ("safetensors", "bin", "pt") for path in folder.glob(f"*.{suffix}"))
    if not found:
        raise UserError(f"the repository '{name}' holds no embedding file at its top")
    return next((path for path in found if path.stem == "learned_embeds"), found[0])


def interpolate(first: Concept, second: Concept, share: float, word: str | None = None) -> Concept:
    """A concept between two: `share` 0 gives the first, 1 the second; its vectors lie on the line between theirs.

    Raises:
        UserError: they have different numbers of vectors or are for different text encoders.
    """
    a, b = first.embeddings.concepts, second.embeddings.concepts
    if [c.vectors.shape for c in a] != [c.vectors.shape for c in b] or [c.encoder for c in a] != [
        c.encoder for c in b
    ]:
        raise UserError(
            f"{first!r} and {second!r} cannot be interpolated: their vectors differ in number or kind"
        )
    mixed = tuple(
        ConceptVectors(word or one.trigger, one.vectors.lerp(other.vectors, share), one.encoder, one.part)
        for one, other in zip(a, b, strict=True)
    )
    return Concept(LearnedEmbeddings(mixed))


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
    images: Images | None = None,
    *,
    placeholder: str = "*",
    init: str | None = None,
    model: str | Path = WEIGHTS,
    recipe: str | Sequence[str] = (),
    logdir: str | Path = "logs",
    settings: Mapping[str, Any] | None = None,
    on_progress: Callable[[RunRecord], object] | None = None,
    resume: str | Path | None = None,
    quiet: bool = True,
    **further: Any,
) -> Concept:
    """Learn a word from a few images; every weight of the model stays as it is.

    The run is one of main.py, with a folder in `logdir`. Ctrl-C (or the notebook's stop button) saves and raises
    KeyboardInterrupt; `ldm.invert(resume=FOLDER)` goes on where it stopped.

    Args:
        images: a folder, or image files and `PIL` images, which are copied into `logdir`.
        placeholder: the new word, such as "*" or "<my-cat>".
        init: the text that the vectors start from; by default the YAML's.
        model: a checkpoint, or a folder with one; by default the embedded model.
        recipe: names from configs/recipes ("fast", "low-memory", ...), or paths of YAMLs.
        settings: any keys of the YAML, such as {"data.params.batch_size": 2}.
        on_progress: called about once a second with the `RunRecord`: step, total, curves(), previews().
        resume: a run folder that goes on; everything else comes from its YAMLs.
        quiet: log warnings only.
        further: fields of `Inversion`: vectors, kind, steps, rate, batch_size, seed, name, base, ...

    Returns:
        the concept, with the vectors of the best step if the run measured one, else of the last.

    Raises:
        UserError: something is wrong with the images, the settings or the machine; nothing that was learned is lost.
        KeyboardInterrupt: it was interrupted, and saved.
    """
    from ldm.training.run import run

    if resume is not None:
        words = ["-r", str(resume), "-t", *_overrides(settings)]
    else:
        if images is None:
            raise UserError("give images: a folder, or a list of image files")
        folder, is_given = _folder_of(images, Path(logdir))
        unknown = sorted(further.keys() - Inversion.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(Inversion.__dataclass_fields__)
            raise UserError(f"invert has no argument '{unknown[0]}'; it has {known}")
        names = (recipe,) if isinstance(recipe, str) else tuple(recipe)
        asked = Inversion(
            folder,
            placeholder,
            init,
            model,
            recipes=names,
            logdir=logdir,
            settings=(*further.pop("settings", ()), *_overrides(settings)),
            **further,
        )
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
            raise KeyboardInterrupt("stopped before the first step") from stop
    if watcher.folder is None:
        raise UserError("the run did not train")
    if on_progress is not None:
        on_progress(RunRecord.read(watcher.folder, own=True))
    if code:
        raise KeyboardInterrupt(f"stopped and saved; go on with ldm.invert(resume={str(watcher.folder)!r})")
    return _of_run(watcher.folder)


def _of_run(folder: Path) -> Concept:
    files_of_run = RunRecord.read(folder, own=True).concepts()
    path = files_of_run.get("best") or files_of_run.get("last")
    if path is None:
        raise UserError(
            f"'{folder}' holds no learned word yet; name a run folder with checkpoints/embeddings.pt"
        )
    return Concept(read(path), path, folder)


def _overrides(settings: Mapping[str, Any] | None) -> list[str]:
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix(_YAML_END).strip()}"
        for key, value in (settings or {}).items()
    ]


def _folder_of(images: Images, logdir: Path) -> tuple[Path, bool]:
    """The folder of the images, and whether it was given; image files and images are copied into one."""
    if isinstance(images, (str, Path)) and not Path(images).is_file():
        return Path(in_checkout(str(images))), True
    several = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not several:
        raise UserError("the list of images is empty; three to five images are usual")
    copies = [one if isinstance(one, Image.Image) else open_image(one) for one in several]
    digest = hashlib.sha256(b"".join(image.tobytes() for image in copies)).hexdigest()[:12]
    # Hidden, so that it is not taken for a run; named by its content, so that a second call finds it again.
    folder = logdir / ".images" / digest
    for number, image in enumerate(copies, start=1):
        target = folder / f"{number:03}.png"
        if not target.is_file():
            files.atomic_write(target, lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]
        source = several[number - 1]
        caption = None if isinstance(source, Image.Image) else Path(source).with_suffix(".txt")
        if caption is not None and caption.is_file():
            files.write_text(
                target.with_suffix(".txt"), caption.read_text(encoding="utf-8-sig", errors="replace")
            )
    return folder, False


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Show the warnings of `ldm` only, and none of Lightning's advice."""
    if not quiet:
        yield
        return
    from lightning_fabric.utilities.warnings import PossibleUserWarning

    library, lightning = logging.getLogger("ldm"), logging.getLogger("pytorch_lightning")
    fabric = logging.getLogger("lightning_fabric")
    before = [(log, log.level, log.propagate) for log in (library, lightning, fabric)]
    levels = [(handler, handler.level) for handler in library.handlers]
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    # The log in the run folder has the messages too, so the library's level must not stop them.
    library.setLevel(logging.INFO)
    library.propagate = False
    library.addHandler(shown)
    for log in (lightning, fabric):
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            yield
    finally:
        library.removeHandler(shown)
        for log, level, propagate in before:
            log.level, log.propagate = level, propagate
            log.setLevel(level)
        for handler, level in levels:
            handler.setLevel(level)
