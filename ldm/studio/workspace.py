"""The folders that the page works in: what may be named, what was uploaded, which models and words there are."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm import files
from ldm.data.captions import CaptionFiles
from ldm.embeddings import LearnedEmbeddings
from ldm.embeddings.concept import model_names
from ldm.embeddings.method_files import MethodFile, read_words
from ldm.files import CHECKOUT, in_checkout
from ldm.generate.session import WEIGHTS
from ldm.images import CAPTION_SUFFIXES, ImageError, list_images, open_image, squares
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.training.record import RunRecord
from ldm.util import UserError
from ldm.words import file_stem

# The most bytes of one file and pixels of one image that are taken, and the most images of one set.
MOST_BYTES, MOST_PIXELS, MOST_IMAGES = 64 * 2**20, 50_000_000, 200
# The side of a shown image, in pixels.
THUMBNAIL = 160
_FORMATS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
}
_WORD_SUFFIXES = (".safetensors", ".pt", ".bin", ".png", ".webp")
# The Hamming distance of two 64-bit image hashes below which images are nearly the same.
_NEAR = 6


@dataclass(frozen=True)
class Finding:
    """Something about a set of images that a person should know; `bad` if it cannot be trained with."""

    text: str
    bad: bool = False


class Thumbnail(NamedTuple):
    """An image of a set as training sees it, as the address of its pixels; `side` in pixels, None for its own."""

    name: str
    address: str
    caption: str
    side: int | None


@dataclass(frozen=True)
class Word:
    """A learned word in a file; `norm` is the mean of its vectors, None for a word that is more than vectors."""

    path: Path
    trigger: str
    vectors: int
    width: int
    models: str
    norm: float | None
    source: str


class Workspace:
    """The folders below one root: `logs` (runs), `data`, `models`, `configs`, `embeddings`, `outputs`.

    Args:
        root: the folder in which commands are run.
        confined: accept only paths inside the root; otherwise any path of this machine may be named.
    """

    def __init__(self, root: str | Path = ".", *, confined: bool = False) -> None:
        self.root = Path(root).resolve()
        self.confined = confined
        self.logs, self.data = self.root / "logs", self.root / "data"
        self.models, self.embeddings = self.root / "models", self.root / "embeddings"
        self.outputs, self.uploads = self.root / "outputs" / "studio", self.root / "data" / "uploads"

    def path(self, text: str | Path) -> Path:
        """The absolute path that a person named, links followed.

        Raises:
            UserError: it is outside the root and the page is confined, or is no path at all.
        """
        try:
            path = (self.root / Path(str(text).strip()).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"'{str(text)[:80]!r}' is not a path") from error
        if self.confined and not path.is_relative_to(self.root) and not _shipped(path):
            raise UserError(f"'{str(text)[:120]}' is outside the page's folder; name a path inside it")
        return path

    def inside(self, folder: Path, name: str) -> Path:
        """An entry directly in a folder, by its name, which is never a path.

        Raises:
            UserError: the name is not that of an entry of this folder.
        """
        if not name or name in (".", "..") or any(c in name for c in "/\\\0") or not (folder / name).exists():
            raise UserError(f"there is no '{name[:80]}'")
        path = (folder / name).resolve()
        if path.parent != folder.resolve():
            raise UserError(f"'{name[:80]}' leads out of its folder")
        return path

    def shown(self, path: str | Path) -> str:
        """A path as commands name it: relative to the root where it is inside."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def run(self, name: str) -> RunRecord:
        """The run of a folder's name."""
        return RunRecord.read(self.inside(self.logs, name))

    # -- images ------------------------------------------------------------------------------------------------

    def take_images(self, name: str, sources: Sequence[str | Path]) -> tuple[Path, list[str]]:
        """Copy uploaded images into a folder of `data/uploads`; returns it, and a line for each that was refused.

        The name of an uploaded file only decides how its copy is called; its content decides what it is. A `.txt`
        beside an image of the same name is its caption.

        Raises:
            UserError: no image is left.
        """
        refused, copies = [], []
        captions = {
            Path(source).stem: Path(source) for source in sources if Path(source).suffix.lower() == ".txt"
        }
        images = [Path(source) for source in sources if Path(source).suffix.lower() != ".txt"]
        if len(images) > MOST_IMAGES:
            refused.append(f"only the first {MOST_IMAGES} of {len(images)} images were taken; five are usual")
        for source in images[:MOST_IMAGES]:
            try:
                copies.append((source, check_upload(source)))
            except UserError as error:
                refused.append(str(error))
        if not copies:
            raise UserError("; ".join(refused)[:280] or "drop image files first")
        digest = hashlib.sha256(
            "".join(sorted(files.file_hash(path) for path, _ in copies)).encode()
        ).hexdigest()
        folder = self.uploads / f"{file_stem(name or 'images')}-{digest[:6]}"
        taken: set[str] = set()
        for source, suffix in copies:
            stem, number = file_stem(source.stem), 1
            while (chosen := stem if number == 1 else f"{stem}-{number}").casefold() in taken:
                number += 1
            taken.add(chosen.casefold())
            target = folder / f"{chosen}{suffix}"
            if not target.exists():
                with source.open("rb") as file:
                    files.atomic_write(target, functools.partial(shutil.copyfileobj, file))
            if source.stem in captions and captions[source.stem].stat().st_size < 10_000:
                text = captions[source.stem].read_text(encoding="utf-8-sig", errors="replace")
                files.write_text(target.with_suffix(".txt"), text)
        return folder, refused

    def images(self, folder: str | Path) -> list[Path]:
        """The images of a folder that a person named; UserError if there are none."""
        return list_images(self.path(folder))[:MOST_IMAGES]

    def captions(self, folder: str | Path) -> dict[Path, str | UserError]:
        """The caption beside each image as training reads it, an empty text, or why it cannot be read."""
        images = self.images(folder)
        beside = CaptionFiles(images)
        found: dict[Path, str | UserError] = {}
        for path in images:
            try:
                found[path] = beside.text(path) or ""
            except UserError as error:
                found[path] = error
        return found

    def write_caption(self, folder: str | Path, name: str, text: str) -> None:
        """Write the caption beside an image of a folder; an empty one removes the file.

        Raises:
            UserError: the folder has no such image.
        """
        path = next((path for path in self.images(folder) if path.name == name), None)
        if path is None:
            raise UserError(f"there is no image '{name[:80]}' in '{str(folder)[:80]}' any more")
        there = [file for suffix in CAPTION_SUFFIXES if (file := path.with_suffix(suffix)).is_file()]
        if text := " ".join(text.split()):
            files.write_text(there[0] if there else path.with_suffix(CAPTION_SUFFIXES[0]), text + "\n")
        else:
            for file in there:
                file.unlink()

    # -- models and words --------------------------------------------------------------------------------------

    def model(self, text: str) -> str:
        """A model as a person named it: a path that may be named, or a hub id."""
        text = text or WEIGHTS
        path = self.path(in_checkout(text))
        if not path.exists() and text.count("/") == 1 and not text.startswith((".", "~", "models/")):
            return text
        return self.shown(path)

    def word_file(self, text: str) -> Path:
        """The path of an embedding file that a person named."""
        path = self.path(text)
        if path.suffix.lower() not in (".pt", ".safetensors", ".bin", ".png", ".webp"):
            raise UserError(f"'{text}' is not an embedding file")
        return path

    def model_files(self) -> list[str]:
        """The checkpoints below `models`, as commands name them, the embedded model first."""
        roots = dict.fromkeys([CHECKOUT / "models", self.models])
        found: dict[Path, None] = {}
        for root in roots:
            for path in sorted(_files_below(root, (".safetensors", ".ckpt"), depth=4)):
                if path.stat().st_size > 2**20 and "towers" not in path.parts and "judge" not in path.parts:
                    found[path.resolve()] = None
        order = sorted(found, key=lambda path: ("creatures" not in path.parts, str(path)))
        return [self.shown(path) for path in order if not self.confined or path.is_relative_to(self.root)
                or _shipped(path)]  # fmt: skip

    def word_files(self) -> list[Path]:
        """The embedding files of `embeddings`, and of each run its best vectors or the last ones."""
        found = sorted(_files_below(self.embeddings, _WORD_SUFFIXES, depth=3))
        runs = sorted(
            self.logs.glob("*/checkpoints/embeddings.pt"), key=lambda p: p.stat().st_mtime, reverse=True
        )
        for last in runs:
            best = last.with_name("embeddings_best.pt")
            found.append(best if best.is_file() else last)
        return found

    def words(self) -> tuple[list[Word], list[str]]:
        """What is in the embedding files, and a line for each file that cannot be read."""
        words, problems = [], []
        for path in self.word_files():
            try:
                learned = _read_once(path, path.stat().st_mtime_ns)
            except (UserError, OSError) as error:
                problems.append(str(error))
                continue
            if isinstance(learned, MethodFile):
                models = f"{model_names(learned.encoder, learned.width)}, by {learned.method}"
                words += [
                    Word(path, trigger, count, learned.width, models, None, self.shown(path))
                    for trigger, count in learned.words.items()
                ]
                continue
            for concept in learned.concepts:
                if concept.trigger in PER_IMAGE_TOKENS and len(learned.triggers) > 1:
                    continue  # the words of single images
                words.append(
                    Word(
                        path,
                        concept.trigger,
                        len(concept.vectors),
                        concept.width,
                        concept.models,
                        float(concept.vectors.norm(dim=1).mean()),
                        self.shown(path),
                    )
                )
        return words, problems


@functools.lru_cache(maxsize=512)
def _read_once(path: Path, changed: int) -> LearnedEmbeddings | MethodFile:
    return read_words(path)


def check_upload(path: Path) -> str:
    """Check an uploaded image and return the suffix of its format; the pixels are read at last.

    Raises:
        UserError: it is too large, a decompression bomb, damaged, or not an image.
    """
    name = path.name[:80]
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(f"'{name}' has {size / 2**20:.0f} MB; at most {MOST_BYTES // 2**20} MB are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                kind, (width, height) = image.format, image.size
    except Image.DecompressionBombError:
        raise UserError(f"'{name}' has far too many pixels for an image; make it smaller") from None
    except Exception:  # a decoder may raise anything for a file that is not of its format
        hint = "; HEIC photos need converting to JPEG" if path.suffix.lower() in (".heic", ".heif") else ""
        raise UserError(f"'{name}' is not an image that can be read{hint}") from None
    if kind not in _FORMATS:
        raise UserError(f"'{name}' is a {kind} file; convert it to PNG or JPEG")
    if width * height > MOST_PIXELS:
        raise UserError(
            f"'{name}' has {width}x{height} pixels, more than {MOST_PIXELS // 10**6} million; make it smaller"
        )
    open_image(path)
    return _FORMATS[kind]


class _Facts(NamedTuple):
    """What of an image decides whether it is unusual."""

    width: int
    height: int
    digest: str
    hash: int


@functools.lru_cache(maxsize=1024)
def _facts(path: Path, changed: int) -> _Facts:
    image = open_image(path)
    return _Facts(image.width, image.height, files.file_hash(path), _difference_hash(image))


def findings(paths: Sequence[Path], size: int | None) -> Iterator[Finding]:
    """What is unusual about a set of images: unreadable, small, the same twice, nearly the same, few or many."""
    hashes: dict[Path, int] = {}
    digests: dict[str, Path] = {}
    for path in paths:
        try:
            image = _facts(path, path.stat().st_mtime_ns)
        except (ImageError, OSError) as error:
            yield Finding(str(error), bad=True)
            continue
        shorter, longer = sorted((image.width, image.height))
        if size and shorter < size:
            yield Finding(
                f"{path.name} is {image.width}x{image.height}, and is enlarged to {size}: blur is learned too"
            )
        if longer > 2 * shorter:
            yield Finding(
                f"{path.name} is {longer / shorter:.1f} times as long as wide: the crop shows its middle only"
            )
        if image.digest in digests:
            yield Finding(f"{path.name} is the same file as {digests[image.digest].name}: it counts twice")
        else:
            hashes[path] = image.hash
        digests.setdefault(image.digest, path)
    pairs = [
        (a, b)
        for number, a in enumerate(hashes)
        for b in list(hashes)[number + 1 :]
        if (hashes[a] ^ hashes[b]).bit_count() <= _NEAR
    ]
    if len(pairs) == 1:
        yield Finding(f"{pairs[0][0].name} and {pairs[0][1].name} look alike: another view teaches more")
    elif pairs:
        yield Finding(
            f"{len(pairs)} pairs of images look alike: what they share besides the subject is learned too"
        )
    if len(paths) < 3:
        yield Finding(
            f"{len(paths)} image{'s' * (len(paths) > 1)}: three to five from different sides teach more"
        )
    elif len(paths) > 20:
        yield Finding(f"{len(paths)} images: three to five are usual for an object; a style may have more")


@functools.lru_cache(maxsize=512)
def view(path: Path, changed: int, size: int | None, crop: bool) -> str:
    """An image as training crops and resizes it, small, as a data address."""
    image = open_image(path)
    if crop:
        left, top, side = squares(image.width, image.height, 1, (1.0,))[0]
        image = image.crop((left, top, left + side, top + side))
    side = min(size or THUMBNAIL, THUMBNAIL)
    written = io.BytesIO()
    image.resize((side, side), Image.Resampling.BICUBIC).save(written, "webp", quality=90)
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode()


def _difference_hash(image: Image.Image) -> int:
    """64 bits, whether each pixel of a tiny grey copy is brighter than its neighbour."""
    grey = list(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR).tobytes())
    bits = [grey[row * 9 + column] > grey[row * 9 + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << place for place, bit in enumerate(bits))


# Classes that a YAML of a run may name: functions of the same modules could be called with any arguments.
_TARGET = re.compile(
    r"(ldm\.(models|modules|training|lr_scheduler|data\.personalized(_style)?)|main|torch\.(optim|nn)"
    r"|pytorch_lightning\.(callbacks|loggers))(\.\w+)*\.[A-Z]\w*"
)


def check_yaml(config: Any, workspace: Workspace) -> None:
    """Check a YAML that somebody wrote on a page that others reach.

    Raises:
        UserError: it names a target that is no class of a run, or a path outside the page's folder.
    """
    if isinstance(config, Mapping):
        target = config.get("target")
        if target is not None and not _TARGET.fullmatch(str(target)):
            raise UserError(f"target '{str(target)[:80]}' is not allowed on a page that others reach")
        for value in config.values():
            check_yaml(value, workspace)
    elif isinstance(config, (list, tuple)):
        for value in config:
            check_yaml(value, workspace)
    elif isinstance(config, str) and (config.startswith(("/", "~", "\\")) or ".." in Path(config).parts):
        workspace.path(config)


def _shipped(path: Path) -> bool:
    """Whether a path is one of the models, YAMLs and sample concepts that come with this library."""
    return any(path.is_relative_to(CHECKOUT / name) for name in ("models", "configs", "data"))


def _files_below(folder: Path, suffixes: Sequence[str], depth: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and depth > 1:
            yield from _files_below(entry, suffixes, depth - 1)
        elif entry.suffix.lower() in suffixes and entry.is_file():
            yield entry
