"""A model in memory that generates with learned words: what the commands, the Python call and the page share."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray
from omegaconf import DictConfig
from PIL.Image import Image
from torch import Tensor

from ldm.base_models import read_config
from ldm.checkpoint import load_model_from_config
from ldm.embeddings import LearnedEmbeddings
from ldm.embeddings.method_files import MethodFile, read_words, triggers_of
from ldm.files import file_hash, in_checkout
from ldm.generate.embeddings import check_token_limit, load_embeddings
from ldm.generate.images import OutputError, generate
from ldm.generate.prompt_syntax import SYNTAXES
from ldm.generate.request import Words, class_words, read_all, resolve
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import (
    UserError,
    best_device,
    check_integer,
    check_value,
    free_memory,
    shown,
)
from ldm.values import plain
from ldm.words import check_text, pattern

logger = logging.getLogger(__name__)

# The embedded model, relative to the root of the checkout.
WEIGHTS = "models/ldm/creatures/model.safetensors"


def warn_truncated(model: LatentDiffusion, prompts: Iterable[str], syntax: str) -> None:
    """Log a warning for text beyond the token limit.

    Raises:
        UserError: a placeholder is beyond it, or the prompt's syntax is not supported.
    """
    for prompt in dict.fromkeys(prompts):
        lost = check_token_limit(model.cond_stage_model, model.embedding_manager, prompt, syntax)
        if lost:
            logger.warning('the token limit truncates the prompt: "%s" has no effect', lost[:120])


def checkpoint_of(model: str | Path) -> str:
    """What to load as a model: the only checkpoint in a folder, or what was named; found in the checkout too."""
    check_value("model", model, "", str)
    place = Path(in_checkout(str(model)))
    found = [file for suffix in ("safetensors", "ckpt") for file in sorted(place.glob(f"*.{suffix}"))]
    return str(found[0] if place.is_dir() and len(found) == 1 else place)


def load_latent_diffusion(
    config: DictConfig,
    ckpt: str | Path,
    device: str | None = None,
    *,
    vae: str | None = None,
    precision: str = "full",
) -> LatentDiffusion:
    """Load a model, by default on the GPU if there is one.

    Args:
        vae: file, folder or hub id of another first stage.
        precision: "autocast" keeps in half precision, on a GPU, what autocast would convert at each use.
    Raises:
        UserError: the checkpoint does not fit, or it is not a LatentDiffusion.
    """
    device = device or best_device()
    try:
        torch.zeros(1, device=device).item()  # there are devices without numbers
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"the device '{device}' is not usable here; leave it out, or choose cpu") from error
    half = torch.float16 if precision == "autocast" and device != "cpu" else None
    model = load_model_from_config(config, ckpt, device, vae=vae, half=half)
    if not isinstance(model, LatentDiffusion):
        raise UserError(
            f"the config of '{ckpt}' describes {type(model).__name__}, which cannot generate images from prompts; "
            "name a LatentDiffusion and its config"
        )
    return model


class Labels:
    """The fields "Model hash", "Model" and "TI hashes" of the settings of images, as AUTOMATIC1111 writes them.

    The checkpoint is hashed in a thread while the model is loaded and the first images are sampled, because that takes
    seconds for a large one. A hash that cannot be computed is left out.
    """

    def __init__(self, ckpt: str | Path, words: Sequence[Words] = ()) -> None:
        self.ckpt = Path(ckpt)
        pool = ThreadPoolExecutor(1)
        self._hash: Future[str | None] = pool.submit(_hash, self.ckpt)
        pool.shutdown(wait=False)
        self.use(words)

    def use(self, words: Sequence[Words]) -> None:
        """The words of the images to come; those that were not read from a file have no hash."""
        self._words: dict[str, str] = {}
        for word in words:
            if isinstance(word, (str, Path)) and (digest := _hash(Path(word))):
                self._words.update(dict.fromkeys(triggers_of(word), digest[:12]))

    def __call__(self, prompt: str) -> Mapping[str, str]:
        digest = self._hash.result()
        labels = {"Model hash": digest[:10]} if digest else {}
        labels["Model"] = self.ckpt.parent.name if self.ckpt.stem == "model" else self.ckpt.stem
        hashes = [
            f"{re.sub('[:,]', '', word)}: {value}"
            for word, value in self._words.items()
            if re.search(pattern(word), prompt, re.IGNORECASE)
        ]
        return labels | ({"TI hashes": ", ".join(hashes)} if hashes else {})


def _hash(path: Path) -> str | None:
    try:
        return file_hash(path)
    except UserError:
        return None


class Session:
    """A text-to-image model that is loaded once and generates any number of times, with other words each time.

    Args:
        model: a checkpoint's file, or a folder that holds one.
        config: its YAML; by default config.yaml beside it, or that of the published model it is.
        device: by default the GPU if there is one.

    Raises:
        UserError: there is no such model, or it cannot generate images from prompts.
    """

    def __init__(
        self, model: str | Path = WEIGHTS, config: str | Path | None = None, device: str | None = None
    ) -> None:
        check_value("config", config, "", str | None)
        self.ckpt = checkpoint_of(model)
        self.config = read_config(self.ckpt, config)
        self._labels = Labels(self.ckpt)
        self.model = load_latent_diffusion(self.config, self.ckpt, device)
        self._without_words = self.model.embedding_manager

    def generate(
        self,
        prompts: str | Sequence[str] = (),
        *,
        words: Words | Sequence[Words] = (),
        negative_prompt: str = "",
        count: int = 1,
        prompt_syntax: str = "a1111",
        **settings: Any,
    ) -> list[Image]:
        """Generate `count` images of each prompt.

        Args:
            prompts: by default "a photo of" the first word.
            words: embedding files of any tool, concepts, or vectors (`ldm.embeddings.LearnedEmbeddings`).
            settings: those of `ldm.generate.images.generate`: steps, scale, sampler, seed, height, width, progress, ...
                `class_words` may also be a list of texts PLACEHOLDER=WORD, for some of the placeholders.

        Raises:
            UserError: a word, a setting or the size does not fit.
        """
        known = inspect.signature(generate).parameters
        if unknown := sorted(settings.keys() - known.keys() | settings.keys() & {"labels", "model"}):
            names = ", ".join(name for name in list(known)[2:] if name != "labels")
            raise UserError(f"generate has no setting '{unknown[0]}'; it has {names}")
        # Numbers of numpy are as good as others.
        settings = {name: plain(v) if getattr(v, "ndim", None) == 0 else v for name, v in settings.items()}
        count = check_integer(plain(count), "count")
        for name in ("progress", "on_image"):
            if settings.get(name) is not None and not callable(settings[name]):
                raise UserError(f"{name} is {shown(settings[name])}; give a function")
        if prompt_syntax not in SYNTAXES:
            raise UserError(f"prompt_syntax is {shown(prompt_syntax)}; choose one of {', '.join(SYNTAXES)}")
        given = [check_text(prompt, "prompt") for prompt in _several(prompts)]
        negative_prompt = check_text("" if negative_prompt is None else negative_prompt, "negative prompt")
        held = list(dict.fromkeys(_file_or_vectors(word) for word in _several(words)))
        resolved = resolve(
            self.config, given, negative_prompt, held, syntax=prompt_syntax, dials=settings.get("dials")
        )
        self.use(resolved.words)
        warn_truncated(self.model, [*resolved.prompts, resolved.negative_prompt], prompt_syntax)
        classes = settings.get("class_words")
        if settings.get("concept_strength", 1.0) != 1.0 and isinstance(classes, list | tuple | None):
            texts = [check_text(text, "class word") for text in classes or ()]
            settings["class_words"] = class_words(resolved.words, resolved.prompts, texts)
        try:
            return generate(
                self.model,
                [prompt for prompt in resolved.prompts for _ in range(count)],
                negative_prompt=resolved.negative_prompt,
                prompt_syntax=prompt_syntax,
                labels=self._labels,
                **settings,
            )
        except OutputError as error:
            raise UserError(f"'{self.ckpt}': {error}") from error

    def use(self, words: Sequence[Words]) -> None:
        """Let the model hold these words and no others; with an error, those that it held."""
        held = read_all(self.config, words)
        self.model.embedding_manager = copy.deepcopy(self._without_words)
        if held:
            load_embeddings(self.model, held)
        self._labels.use(words)


_loaded: dict[tuple[Any, ...], Session] = {}


def text_to_image(
    prompts: str | Sequence[str] = (),
    *,
    words: Words | Sequence[Words] = (),
    model: str | Path | Session = WEIGHTS,
    config: str | Path | None = None,
    device: str | None = None,
    **settings: Any,
) -> list[Image]:
    """Generate images from prompts with learned words; this is `ldm.generate(...)`.

    The model stays in memory for the next call, until another one is named; `release()` frees it. The settings are
    those of `Session.generate`: count, negative_prompt, steps, scale, sampler, seed, height, width, dials, init, ...
    Each image has its settings in `image.info["parameters"]`, and `ldm.generate.save_image` writes them into a file.

    Args:
        prompts: one or several; by default "a photo of" the first word.
        words: embedding files of any tool, concepts from `ldm.invert` or `ldm.load`, or vectors.
        model: a checkpoint, a folder with one, or a `Session`; by default the embedded model.

    Raises:
        UserError: a word, a setting, the size or the model does not fit.
    """
    if not isinstance(model, Session):
        path = checkpoint_of(model)
        changed = Path(path).stat().st_mtime_ns if Path(path).exists() else 0  # 0 of a hub id
        key = (path, changed, str(config), device)
        if key not in _loaded:
            release()
            _loaded[key] = Session(path, config, device)
        model = _loaded[key]
    return model.generate(prompts, words=words, **settings)


def _several(given: Any) -> list[Any]:
    """The items of a list, or a single one."""
    if given is None:
        return []
    is_list = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Tensor, ndarray))
    return list(given) if is_list else [given]


def _file_or_vectors(word: Any) -> Words:
    """The file of a concept, whose hash is part of the settings, or what it holds if that is no longer in the file.

    Raises:
        UserError: it is no word.
    """
    path, held = getattr(word, "path", None), getattr(word, "embeddings", word)
    if not isinstance(held, (str, Path, LearnedEmbeddings, MethodFile)):
        raise UserError(
            f"words holds {type(word).__name__}, no word; give embedding files, or concepts of ldm.load or ldm.invert"
        )
    if path is None or isinstance(held, (str, Path)):
        return held
    try:
        there = read_words(path)
    except UserError:
        return held
    mine, other = _tensors(held), _tensors(there)
    same = mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    return path if same else held


def _tensors(held: LearnedEmbeddings | MethodFile) -> dict[tuple[str, ...], Tensor]:
    if isinstance(held, MethodFile):
        return {(*held.words, name): tensor for name, tensor in held.tensors.items()}
    return {(one.trigger, str(one.encoder), one.part): one.vectors for one in held.concepts}


def release() -> None:
    """Free the model that `text_to_image` keeps."""
    _loaded.clear()
    free_memory()
