"""A word learned from a few images by one call: `ldm.invert`; the page builds its command lines by the same class."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
import yaml
from PIL import Image
from torch import Tensor

from ldm import files
from ldm.console import ConsoleHandler, Interrupted
from ldm.data.captions import CaptionFiles
from ldm.embeddings import DEFAULT_FORMAT, LearnedEmbeddings, merge, read, write
from ldm.embeddings import Concept as ConceptVectors
from ldm.embeddings.method_files import MethodFile, read_words, write_method_file
from ldm.embeddings.tensor_formats import SECOND_FILE
from ldm.embeddings.writer import format_named
from ldm.generate.session import WEIGHTS, checkpoint_of
from ldm.images import open_image
from ldm.modules.embedding_manager import NEGATIVE
from ldm.training import record
from ldm.training.callbacks.base import RunCallback
from ldm.training.config import training_yaml
from ldm.training.flags import TEMPLATES
from ldm.training.record import RunRecord, is_run
from ldm.training.run_folder import existing_run_folder
from ldm.util import ConfigError, UserError, cut, shown
from ldm.weights import hub_reason
from ldm.words import file_stem
from ldm.yaml_files import in_checkout

logger = logging.getLogger(__name__)

Images: TypeAlias = "str | Path | Image.Image | Sequence[str | Path | Image.Image]"

RECIPES = "configs/recipes"
_YAML_END = "...\n"  # what the YAML of a single value ends with


@dataclass(frozen=True)
class Inversion:
    """What is to be learned, and how, as a command line of main.py.

    A field that is None leaves the YAML's value. `recipes` are names of files in configs/recipes, or paths of YAMLs;
    `rate` is a number or rates by steps ("0.005:100, 1e-3:1000"); `preview_every` is in steps; `settings` are further
    "dotted.key=value" words.
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
    preview_every: int | None = None
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

    `ldm.generate(..., words=concept)` uses it. A word of a method (see `ldm.modules.methods`) is more than vectors, and
    is saved as a file of its method alone.
    """

    embeddings: LearnedEmbeddings | MethodFile
    path: Path | None = None
    run: Path | None = None

    @property
    def word(self) -> str:
        """The placeholder to write in prompts; the first, if there are several."""
        return self.embeddings.triggers[0]

    @property
    def vectors(self) -> Tensor:
        """The vectors [N, d] of the word, float32 on the CPU; UserError for a word of a method."""
        return self._plain.concepts[0].vectors

    @property
    def _plain(self) -> LearnedEmbeddings:
        if isinstance(self.embeddings, LearnedEmbeddings):
            return self.embeddings
        raise UserError(
            f"'{shown(self.word)}' is of the method '{shown(self.embeddings.method)}' and more than vectors; it can be "
            "generated with, renamed and saved in the default format"
        )

    @property
    def record(self) -> RunRecord | None:
        """The curves, previews and verdict of its run."""
        return None if self.run is None else RunRecord.read(self.run, own=True)

    def renamed(self, word: str) -> Concept:
        """The same vectors for another word; a negative that was learned with it goes along."""
        names = {self.word: word}
        if f"{self.word}{NEGATIVE}" in self.embeddings.triggers:
            names[f"{self.word}{NEGATIVE}"] = f"{word}{NEGATIVE}"
        return replace(self, embeddings=self.embeddings.renamed(names), path=None)

    def save(
        self,
        path: str | Path | None = None,
        format: str = DEFAULT_FORMAT,
        preview: Image.Image | None = None,
    ) -> Path:
        """Write a file in the format of a tool (a key of `ldm.FORMATS`) and return its path.

        Args:
            path: a file; a folder gets a file that is named after the word, as does the current one by default.
            preview: what an "a1111-png" shows.

        Raises:
            UserError: the format is unknown or cannot hold the vectors, or the file cannot be written.
        """
        place = Path() if path is None else Path(path)
        if place.is_dir():
            place /= f"{file_stem(self.word)}{format_named(format).suffix}"
        if isinstance(self.embeddings, MethodFile) and format == DEFAULT_FORMAT:
            return write_method_file(self.embeddings, place)
        return write(self._plain, place, format, preview)

    def __repr__(self) -> str:
        if isinstance(self.embeddings, MethodFile):
            return f"<Concept {self.word!r}: by the method '{self.embeddings.method}'>"
        count, width = self.vectors.shape
        return f"<Concept {self.word!r}: {count} vector{'s' * (count > 1)} of width {width}>"


def load(source: str | Path) -> Concept:
    """Load what was learned from one file of any tool, a run folder, or a repository on the Hugging Face hub.

    Args:
        source: a file; a folder; "owner/name" on the hub, or "owner/name/file" where that holds several.

    Raises:
        UserError: there is no such file or repository, or it holds no embedding, or several.
    """
    found = _concepts_of(source)
    if len(found) > 1:
        names = ", ".join(f"'{one.path.name}'" for one in found if one.path)
        raise UserError(
            f"'{source}' holds {len(found)} embedding files ({cut(names, 120)}); name one, or use ldm.load_all"
        )
    return found[0]


def load_all(sources: str | Path | Iterable[str | Path]) -> list[Concept]:
    """Load all words of one or several sources (see `load`), one `Concept` for each word.

    Raises:
        UserError: there is no such source, or one holds no embedding.
    """
    several = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found = [concept for source in several for concept in _concepts_of(source)]
    return [
        replace(concept, embeddings=concept.embeddings.only(word))
        for concept in found
        for word in concept.embeddings.triggers
    ]


def _concepts_of(source: str | Path) -> list[Concept]:
    path = Path(in_checkout(str(source)))
    if not path.exists() and (match := _HUB.fullmatch(str(source))):
        path = _from_hub(match["repository"], match["file"])
    if not path.is_dir():
        return [Concept(read_words(path), path)]
    if is_run(path):
        return [_of_run(path)]
    files_there = _embedding_files(path)
    if not files_there:
        raise UserError(f"'{source}' holds no learned word; name an embedding file, or a folder with some")
    return [_of_file(file, files_there) for file in files_there if not _is_second(file, files_there)]


# A repository in the hub, and perhaps a file in it.
_HUB = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[\w.-]+))?")
# The endings of embedding files in folders and repositories; of files with the same stem the first is used.
_ENDINGS = (".safetensors", ".bin", ".pt")
# What diffusers writes during a run beside the last file, and how large a file with learned words may be.
_UNFINISHED = re.compile(r"learned_embeds-steps-\d+")
_LARGEST = 32 * 2**20
# A repository of diffusers' concept library says its word in this file.
_IDENTIFIER = "token_identifier.txt"


def _embedding_files(folder: Path) -> list[Path]:
    found: dict[str, Path] = {}
    for ending in _ENDINGS:
        for path in sorted(folder.glob(f"*{ending}")):
            if not _UNFINISHED.fullmatch(path.stem):
                found.setdefault(path.stem, path)
    return list(found.values())


def _is_second(path: Path, others: Sequence[Path]) -> bool:
    """Whether it holds the vectors of SDXL's second encoder for a file beside it."""
    return any(path.stem == f"{other.stem}{SECOND_FILE}" for other in others)


def _of_file(path: Path, others: Sequence[Path]) -> Concept:
    second = [other for other in others if other.stem == f"{path.stem}{SECOND_FILE}"]
    held = read_words(path)
    if isinstance(held, MethodFile):
        return Concept(held, path)
    learned = merge([held, *(read(file) for file in second)])
    identifier = path.with_name(_IDENTIFIER)
    # Some formats hold no word, and the file's name takes its place.
    if learned.triggers == [path.stem] and identifier.is_file():
        return Concept(
            learned.renamed({path.stem: files.read_text(identifier, "token identifier").strip()}), None
        )
    return Concept(learned, None if second else path)


def _from_hub(repository: str, file: str | None) -> Path:
    """The folder of the embedding files of a repository, or one of them; fetched once."""
    import huggingface_hub as hub

    try:
        folder = Path(hub.snapshot_download(repository, local_files_only=True))
        if file and (folder / file).is_file():
            return folder / file
        if not file and _embedding_files(folder):
            return folder
    except (OSError, ValueError):  # what the hub raises if nothing is there
        pass
    try:
        there = hub.HfApi().model_info(repository, files_metadata=True).siblings or []
        wanted = [
            entry.rfilename
            for entry in there
            if entry.rfilename in (file, _IDENTIFIER)
            or (
                file is None
                and "/" not in entry.rfilename
                and entry.rfilename.endswith(_ENDINGS)
                and (entry.size or 0) <= _LARGEST
            )
        ]
        folder = Path(hub.snapshot_download(repository, allow_patterns=wanted or [_IDENTIFIER]))
    except Exception as error:  # of many kinds: no connection, no such repository, no access, a full disk
        raise UserError(
            f"'{repository}' is neither a file or folder here nor readable from the Hugging Face hub "
            f"({hub_reason(error)}); check the name, or download the file and name that"
        ) from error
    place = folder / file if file else folder
    if not place.exists() or (place.is_dir() and not _embedding_files(place)):
        raise UserError(
            f"the repository '{repository}' holds no {f'file {file!r}' if file else 'embedding file'} at its top; "
            "name one that was learned by textual inversion"
        )
    return place


def interpolate(first: Concept, second: Concept, share: float, word: str | None = None) -> Concept:
    """A concept between two: `share` 0 gives the first, 1 the second; its vectors lie on the line between theirs.

    Raises:
        UserError: they have different numbers of vectors or are for different text encoders.
    """
    if not isinstance(share, (int, float)):
        raise UserError(f"share is {share!r}; give a number, from 0 for the first to 1 for the second")
    a, b = first._plain.concepts, second._plain.concepts
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
    `Stopped`, which has the concept as it is; `ldm.invert(resume=FOLDER)` goes on where it stopped.

    Args:
        images: a folder, or image files and `PIL` images, which are copied into `logdir`.
        placeholder: the new word, such as "*" or "<my-cat>".
        init: the text that the vectors start from; by default the YAML's.
        model: a checkpoint, or a folder with one; by default the embedded model.
        recipe: names from configs/recipes ("fast", "low-memory", ...), or paths of YAMLs.
        settings: any keys of the YAML, such as {"data.params.batch_size": 2}.
        on_progress: called about once a second with the `RunRecord`: step, total, curves(), plot(), previews().
        resume: a run folder that goes on; steps, rate and batch_size can change, the rest comes from its YAMLs.
        quiet: log warnings only, without a progress bar.
        further: fields of `Inversion`: vectors, kind, steps, rate, batch_size, preview_every, seed, name, base, ...

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
    names = (recipe,) if isinstance(recipe, (str, Path)) else tuple(recipe or ())
    if not isinstance(placeholder, str):
        raise UserError(f"placeholder is {placeholder!r}; give a word such as '*' or '<my-cat>'")
    asked = Inversion(
        "",
        placeholder,
        init,
        model,
        recipes=names,
        logdir=logdir,
        settings=tuple(_overrides(settings)),
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
        words += ["--placeholder_string", placeholder] if placeholder != "*" else []
        words += ["--actual_resume", checkpoint_of(model)] if model != WEIGHTS else []
    else:
        if images is None:
            raise UserError("give images: a folder, or a list of image files")
        copied, is_given = _folder_of(images, Path(logdir))
        words = [
            *replace(asked, images=copied).arguments(),
            *([] if is_given else ["--datadir_in_name", "false"]),
        ]
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
        raise Stopped(folder, _of_run(folder) if _files_of_run(folder) else None)
    return _of_run(folder)


def _of_run(folder: Path) -> Concept:
    found = _files_of_run(folder)
    if not found:
        raise UserError(
            f"'{folder}' holds no learned word yet; name a run folder with checkpoints/embeddings.pt"
        )
    return Concept(read_words(found[0]), found[0], folder)


def _files_of_run(folder: Path) -> list[Path]:
    """The files with the vectors of the best step, if the run measured one, and of the last."""
    found = RunRecord.read(folder, own=True).concepts()
    return [found[name] for name in ("best", "last") if name in found]


def _overrides(settings: Mapping[str, Any] | None) -> list[str]:
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(
            f'settings is {shown(settings)}; give a dictionary such as {{"data.params.batch_size": 2}}'
        )
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix(_YAML_END).strip()}"
        for key, value in (settings or {}).items()
    ]


def _folder_of(images: Images, logdir: Path) -> tuple[Path, bool]:
    """The folder of the images, and whether it was given; image files and images are copied into one."""
    if isinstance(images, (str, Path)) and not Path(images).is_file():
        return Path(in_checkout(str(images))), True
    several = (
        list(images) if isinstance(images, Iterable) and not isinstance(images, (str, Path)) else [images]
    )
    if any(not isinstance(one, (str, Path, Image.Image)) for one in several):
        raise UserError(f"images is {shown(images)}; give a folder, or a list of image files")
    if not several:
        raise UserError("the list of images is empty; three to five images are usual")
    copies = [one.convert("RGB") if isinstance(one, Image.Image) else open_image(one) for one in several]
    captions = CaptionFiles(Path(one) for one in several if not isinstance(one, Image.Image))
    digest = hashlib.sha256(b"".join(image.tobytes() for image in copies)).hexdigest()[:12]
    # Hidden, so that it is not taken for a run; named by its content, so that a second call finds it again.
    folder = logdir / ".images" / digest
    for number, image in enumerate(copies, start=1):
        target = folder / f"{number:03}.png"
        if not target.is_file():
            files.atomic_write(target, lambda file, image=image: image.save(file, "PNG"))  # type: ignore[misc]
        source = several[number - 1]
        caption = None if isinstance(source, Image.Image) else captions.text(Path(source))
        if caption is not None:
            files.write_text(target.with_suffix(".txt"), caption)
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
