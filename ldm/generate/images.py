"""Images from prompts, the settings that are written into them, and the numbered files that they are saved in."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.files import atomic_write
from ldm.generate.editing import InitImage, strength_labels, with_class_words
from ldm.generate.embeddings import chunk_count, conditions, dials_at
from ldm.generate.request import ClassWords, check_multiple
from ldm.images import image_grid, to_pil
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import gaussian
from ldm.models.diffusion.steps import steps_taken
from ldm.modules.diffusionmodules.openaimodel import Downsample
from ldm.util import UserError, check_value, evaluating, shown_value
from ldm.values import plain

logger = logging.getLogger(__name__)

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
PRECISIONS = ("full", "autocast")


class OutputError(UserError):
    """The model's output is not finite."""


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    prompts: str | Sequence[str],
    *,
    steps: int = 50,
    scale: float = 5.0,
    eta: float = 0.0,
    sampler: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    seed: int = 42,
    batch_size: int = 4,
    precision: str = "full",
    negative_prompt: str = "",
    prompt_syntax: str = "plain",
    sizes: Mapping[str, Sequence[int]] | None = None,
    x_T: Tensor | None = None,
    init: InitImage | None = None,
    concept_strength: float = 1.0,
    class_words: ClassWords | None = None,
    dials: Mapping[str, float] | None = None,
    numbers: Sequence[int] | None = None,
    labels: Callable[[str], Mapping[str, str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_image: Callable[[int, Image.Image], object] | None = None,
) -> list[Image.Image]:
    """Generate one image per prompt.

    An image depends on `seed`, its number (its index in `prompts`, or its entry in `numbers`), its prompt and the
    settings. The noise of each image is drawn separately and on the CPU, so that neither the batch size nor the
    device matters, up to rounding.

    Args:
        model: its averaged weights are used if it has any; its training mode is restored.
        scale: classifier-free guidance against `negative_prompt`; 1 means no guidance.
        height, width: in pixels; by default the size that the model was trained for.
        precision: "full", or "autocast" for half precision on an accelerator (on a CPU the same as "full").
        prompt_syntax: "plain", or "a1111" or "comfyui" for weighted prompts (see `ldm.generate.prompt_syntax`).
        sizes: size conditions of Stable Diffusion XL; see `LatentDiffusionXL.drawing_at`.
        x_T: the initial noise, [N, C, h, w] for N prompts.
        init: an image to begin from, or to edit where its mask is white.
        concept_strength: what learned words add to their class words, in this strength: 1 is the word as it is and
            costs nothing, 0 the class word alone. Other values take half as long again.
        class_words: the class word of each placeholder, or one for all; see `ldm.generate.editing.class_words`.
        dials: of words of a method, such as {"truncation": 32}; see `Personalization.dials`. Afterwards they have their
            former values.
        labels: gives further fields of the settings of an image, such as "Model hash", for its prompt.
        progress: called after each step with the number of steps done and their total.
        on_image: called for each finished image with its index in `prompts` and the image.

    Returns:
        the images; `image.info["parameters"]` has the settings of each as text (see `Settings`), and `save_image`
        writes it into the file.
    Raises:
        UserError: a setting is out of range, the model cannot generate images of that size, a prompt has syntax
            that is not supported.
        OutputError: the model's output is not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_settings(steps, eta, sampler, height, width, batch_size, precision, scale, seed)
    check_value("concept_strength", concept_strength, "concept_strength", float)
    _check_kind("init", init, InitImage, "an ldm.generate.InitImage, such as InitImage.read('cat.png')")
    _check_kind("x_T", x_T, Tensor, "a tensor [N, C, h, w]")
    check_value("sizes", plain(sizes), "", Mapping[str, Sequence[int]] | None)
    numbers = list(numbers) if isinstance(numbers, Sequence) else plain(numbers)
    check_value("numbers", numbers, "", Sequence[int] | None)
    numbers = range(len(prompts)) if numbers is None else numbers
    if len(numbers) != len(prompts):
        raise UserError(f"numbers has {len(numbers)} entries for {len(prompts)} images; give one for each")
    shape = latent_shape(model, height, width)
    pixels_each = downsampling_factor(model)
    size = shape[1] * pixels_each, shape[2] * pixels_each
    by_class = None if concept_strength == 1.0 else with_class_words(model, prompts, class_words or {})
    if by_class == prompts:
        logger.warning(
            "the concept strength %g changes nothing: no prompt contains a learned word", concept_strength
        )
    device = model.alphas_cumprod.device
    batches = _batches([chunk_count(model, prompt, prompt_syntax) for prompt in prompts], batch_size)
    taken = steps if init is None else steps_taken(init.strength, steps)
    total = taken * len(batches)
    images: list[Image.Image] = []
    with (
        dials_at(model, dials) as dial_labels,
        evaluating(model),
        model.ema_scope(),
        half_precision(precision, device),
    ):
        factor = 1 if init is None else downsampling_factor(model)
        begin = None if init is None else init.at(model, shape[1] * factor, shape[2] * factor)
        for batch, part in enumerate(batches):
            captions = prompts[part]
            generators = [noise_source(seed, number) for number in numbers[part]]
            blank = model.alphas_cumprod.new_empty((len(captions), *shape))
            guided = None if scale == 1.0 else negative_prompt
            of_class = [] if by_class is None else by_class[part]
            texts = [*captions, *of_class, *([] if guided is None else [guided])]
            chunks = max(chunk_count(model, text, prompt_syntax) for text in texts)
            with model.drawing_at(*size, sizes or {}):
                condition, unconditional = conditions(model, captions, guided, prompt_syntax, chunks)
                base, unconditional_base = None, None
                if by_class is not None:
                    # Only learned negatives make a difference between the two; they are words that are dialled too.
                    negatives = [model.negative_prompts(texts) for texts in (captions, of_class)]
                    differ = guided is not None and negatives[0] != negatives[1]
                    base, unconditional_base = conditions(
                        model, of_class, guided if differ else None, prompt_syntax, chunks
                    )
            latents, _ = SAMPLERS[sampler](model).sample(
                steps,
                len(captions),
                shape,
                conditioning=condition,
                callback=_counter(progress, batch * taken, total),
                eta=eta,
                x_T=gaussian(blank, generators) if x_T is None else x_T[part],
                unconditional_guidance_scale=scale,
                unconditional_conditioning=unconditional,
                generator=generators,
                mask=None if begin is None else begin.keep,
                x0=None if begin is None else begin.latent,
                strength=None if init is None else init.strength,
                base_conditioning=base,
                concept_strength=concept_strength,
                unconditional_base_conditioning=unconditional_base,
            )
            pixels = model.decode_first_stage(latents if begin is None else begin.kept_in(latents))
            for prompt, number, decoded in zip(captions, numbers[part], pixels, strict=True):
                if not decoded.isfinite().all():
                    raise OutputError(
                        f"the output for the prompt '{prompt[:80]}' is not finite (NaN or infinity) and would be a "
                        "black image; use full precision, other embeddings, or another copy of the checkpoint"
                    )
                images.append(to_pil(decoded) if begin is None else begin.pasted(to_pil(decoded)))
                settings = Settings(
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    steps=steps,
                    sampler=sampler,
                    scale=scale,
                    seed=seed,
                    width=images[-1].width,
                    height=images[-1].height,
                    number=number,
                    eta=eta,
                    prompt_syntax=prompt_syntax,
                    labels={
                        **_size_labels(sizes or {}),
                        **({} if init is None else init.labels()),
                        **({} if by_class is None else strength_labels(concept_strength, class_words or {})),
                        **dial_labels,
                        **({} if labels is None else labels(prompt)),
                    },
                )
                images[-1].info[PARAMETERS] = settings.as_text()
                if on_image is not None:
                    on_image(len(images) - 1, images[-1])
    return images


def _check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind | None):
        raise UserError(f"{name} is {shown_value(value)}; give {wanted}")


def _size_labels(sizes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The fields of the settings for size conditions of Stable Diffusion XL, such as "Original size: 512x768"."""
    return {name.replace("_", " ").capitalize(): f"{b}x{a}" for name, (a, b) in sizes.items()}


def _batches(chunks: Sequence[int], size: int) -> list[slice]:
    """Consecutive batches of at most `size` prompts with equal numbers of chunks.

    Prompts of different lengths would have to be filled up, and an image would depend on the others of its batch.
    """
    batches: list[slice] = []
    for place, count in enumerate(chunks):
        if batches and place - batches[-1].start < size and chunks[batches[-1].start] == count:
            batches[-1] = slice(batches[-1].start, place + 1)
        else:
            batches.append(slice(place, place + 1))
    return batches


def check_settings(
    steps: int,
    eta: float,
    sampler: str,
    height: int | None,
    width: int | None,
    batch_size: int,
    precision: str,
    scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Raise UserError for a setting of `generate` that is wrong for every model."""
    check_value("the number of sampling steps", steps, "steps", int)
    check_value("eta", eta, "eta", float)
    check_value("the guidance scale", scale, "scale", float)
    check_value("the seed", seed, "image_seed", int)
    check_value("height", height, "height", int | None)
    check_value("width", width, "width", int | None)
    check_value("the batch size", batch_size, "batch_size", int)
    if sampler not in tuple(SAMPLERS):
        raise UserError(f'unknown sampler "{sampler}"; choose one of {", ".join(SAMPLERS)}')
    if eta != 0.0 and sampler != "ddim":
        raise UserError(
            f"eta is {eta}, but the sampler {sampler} is deterministic; use ddim, or leave eta at 0"
        )
    if precision not in PRECISIONS:
        raise UserError(f'unknown precision "{precision}"; choose one of {", ".join(PRECISIONS)}')


def latent_shape(model: LatentDiffusion, height: int | None, width: int | None) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents of images of this size in pixels, by default of the model's own size.

    Raises:
        UserError: the size is not a multiple of what the first stage and the denoiser divide it by.
    """
    factor = downsampling_factor(model)
    own = model.image_size if isinstance(model.image_size, int) else tuple(model.image_size)
    own_height, own_width = (own, own) if isinstance(own, int) else own
    # Each Downsample of the denoiser halves the latent again; its skip connections need an even size.
    multiple = factor * 2 ** sum(isinstance(module, Downsample) for module in model.model.modules())
    check_multiple(multiple, height, width)
    return (
        model.channels,
        own_height if height is None else height // factor,
        own_width if width is None else width // factor,
    )


def downsampling_factor(model: LatentDiffusion) -> int:
    """How many pixels wide the first stage decodes one latent pixel, measured on a latent of one pixel."""
    latent = model.alphas_cumprod.new_zeros((1, model.channels, 1, 1))
    return model.decode_first_stage(latent).shape[-1]


def noise_source(seed: int, number: int) -> torch.Generator:
    """The random generator of one image, independent of that of any other seed or number."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def half_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context with automatic mixed precision, for "autocast" on an accelerator."""
    if precision == "full" or device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.float16)


def _counter(
    progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int], None] | None:
    return None if progress is None else lambda number: progress(before + number + 1, total)


FORMATS = {"png": "PNG", "jpg": "JPEG"}
_FORBIDDEN = '<>:"/\\|?*' if os.name == "nt" else "/"
_MAX_NAME_BYTES = 200  # file systems allow 255; a number and a suffix follow


class ImageFolder:
    """A folder of images named by numbers of `digits` digits; new images continue the numbers of existing files.

    Raises:
        UserError: the folder cannot be created or written to.
    """

    def __init__(self, folder: str | Path, format: str = "png", digits: int = 4) -> None:
        self.folder, self.format, self.digits = Path(folder), format, digits
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the folder '{folder}' ({error.strerror}); choose another"
            ) from error
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"cannot write to the folder '{folder}'; choose another")
        self.next = free_number(self.folder)

    def save(self, image: Image.Image) -> Path:
        """Write the image under the next number and return its path."""
        path = self.folder / f"{self.next:0{self.digits}}.{self.format}"
        self.next += 1
        return save_image(image, path)


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Write an image atomically, in the format of the path's suffix; JPEG at high quality.

    The settings of a generated image are written into the file, where AUTOMATIC1111 writes them: a text of a PNG, the
    EXIF comment of a JPEG.

    Raises:
        UserError: the suffix is neither .png nor .jpg, or the file cannot be written.
    """
    check_value("path", path, "", str)
    path = Path(path)
    format = FORMATS.get(path.suffix.lower().replace(".jpeg", ".jpg")[1:])
    if format is None:
        raise UserError(f"'{path}' does not end in .png or .jpg; images are written in these formats")
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{type(image).__name__} is no type of images; give one of PIL, as ldm.generate returns them"
        )
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    text = image.info.get(PARAMETERS)
    if text and format == "JPEG":
        exif = Image.Exif()
        exif.get_ifd(_EXIF_FOLDER)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
        options["exif"] = exif
    elif text:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(PARAMETERS, text)
    return atomic_write(path, lambda file: image.save(file, format, **options))


def save_grid(images: Sequence[Image.Image], columns: int, path: Path) -> Path:
    """Write one image with the given images in rows of `columns`."""
    return save_image(image_grid(images, columns), path)


def free_number(folder: Path, prefix: str = "") -> int:
    """One more than the largest NUMBER of the files named `prefix`NUMBER.SUFFIX; 0 if there are none."""
    stems = (file.stem.removeprefix(prefix) for file in folder.iterdir() if file.name.startswith(prefix))
    return max((int(stem) + 1 for stem in stems if stem.isascii() and stem.isdigit()), default=0)


def name_of(prompt: str) -> str:
    """A file name for a prompt: spaces become dashes; never too long for a file system, hidden or empty."""
    name = "".join(
        "-" if c.isspace() else "_" if c in _FORBIDDEN or not c.isprintable() else c for c in prompt
    )
    name = name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
    return f"_{name[1:]}" if name.startswith(".") else name or "grid"


# The name of the text in a PNG, and in `Image.info`, that holds the settings.
PARAMETERS = "parameters"
_EXIF_FOLDER, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
# The samplers' names in AUTOMATIC1111.
SAMPLER_NAMES = {"ddim": "DDIM", "plms": "PLMS", "dpm_solver": "DPM++ 2M"}
# One "Name: value" of the last line; a value that contains a comma or a colon is in quotes.
_FIELD = re.compile(r'\s*([A-Za-z][\w /()-]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
_LARGEST_TEXT = 100_000


@dataclass(frozen=True)
class Settings:
    """How an image was generated, as the text that AUTOMATIC1111 writes into images and its users paste.

    A line with the prompt, one with the negative prompt, and one of fields: `Steps: 20, Sampler: DDIM, CFG scale: 7,
    Seed: 1, Size: 512x512, Model hash: ..., Model: ..., TI hashes: "cat: ..."`. The field `Image number` is of this
    repository: an image depends on the seed and its number. `labels` are the fields that have no attribute.
    """

    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    number: int = 0
    eta: float = 0.0
    prompt_syntax: str = "a1111"
    labels: Mapping[str, str] = field(default_factory=dict)

    def as_text(self) -> str:
        """The text that is written into a file."""
        fields = {
            "Steps": self.steps,
            "Sampler": SAMPLER_NAMES.get(self.sampler or "", self.sampler),
            "CFG scale": None if self.scale is None else f"{self.scale:g}",
            "Seed": self.seed,
            "Size": None if self.width is None else f"{self.width}x{self.height}",
            "Eta DDIM": f"{self.eta:g}" if self.eta else None,
            "Prompt syntax": None if self.prompt_syntax == "a1111" else self.prompt_syntax,
            "Image number": self.number or None,
            **self.labels,
        }
        line = ", ".join(
            f"{key}: {_quoted(str(value))}" for key, value in fields.items() if value is not None
        )
        negative = f"{_NEGATIVE} {self.negative_prompt}" if self.negative_prompt else None
        return "\n".join(part for part in (self.prompt, negative, line) if part is not None)

    @classmethod
    def from_text(cls, text: str) -> Settings:
        """Read such a text, also one of AUTOMATIC1111; fields that make no sense are ignored.

        Raises:
            UserError: there are no settings in it.
        """
        lines = text[:_LARGEST_TEXT].strip().split("\n")
        found = {key.strip(): _unquoted(value.strip()) for key, value in _FIELD.findall(lines[-1])}
        if "Steps" not in found:
            raise UserError(
                "there are no settings in the text; they end with a line that begins with 'Steps: 20,'"
            )
        prompt, mark, negative = "\n".join(lines[:-1]).partition(_NEGATIVE)
        names = {name.lower(): sampler for sampler, name in SAMPLER_NAMES.items()}
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", found.pop("Size", ""))
        sampler = found.pop("Sampler", None)
        return cls(
            prompt=prompt.strip(),
            negative_prompt=negative.strip() if mark else "",
            steps=_number(found.pop("Steps", ""), int),
            sampler=names.get((sampler or "").lower(), sampler),
            scale=_number(found.pop("CFG scale", ""), float),
            seed=_number(found.pop("Seed", ""), int),
            width=int(size[1]) if size else None,
            height=int(size[2]) if size else None,
            number=_number(found.pop("Image number", ""), int) or 0,
            eta=_number(found.pop("Eta DDIM", ""), float) or 0.0,
            prompt_syntax=found.pop("Prompt syntax", "a1111"),
            labels=found,
        )

    @classmethod
    def from_image(cls, path: str | Path) -> Settings:
        """Read the settings from a PNG, JPEG or WebP of this repository or AUTOMATIC1111; pixels are not read.

        Raises:
            UserError: the file is not an image, or has no settings.
        """
        try:
            with Image.open(path) as image:
                text = image.info.get(PARAMETERS)
                if not isinstance(text, str):
                    comment = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT, b"")
                    comment = comment.encode("latin-1", "replace") if isinstance(comment, str) else comment
                    text = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
        except Exception as error:  # decoders raise anything for damaged files
            raise UserError(f"cannot read '{path}': it is not an image, or damaged") from error
        try:
            return cls.from_text(text)
        except UserError as error:
            raise UserError(
                f"'{Path(path).name}' has no settings in it; use a PNG as it was generated, not a copy that was edited"
            ) from error


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def _unquoted(value: str) -> str:
    if not (len(value) > 1 and value[0] == value[-1] == '"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text[:40])
    except ValueError:
        return None
    return value if math.isfinite(value) else None
