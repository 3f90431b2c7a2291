"""Images from prompts, and the numbered files that they are saved in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.files import atomic_write
from ldm.generate.prompt_syntax import chunk_count, conditions
from ldm.images import image_grid, to_pil
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import gaussian
from ldm.models.diffusion.steps import check_eta, check_steps
from ldm.modules.diffusionmodules.openaimodel import Downsample
from ldm.util import UserError, evaluating

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
    x_T: Tensor | None = None,
    numbers: Sequence[int] | None = None,
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
        x_T: the initial noise, [N, C, h, w] for N prompts.
        progress: called after each step with the number of steps done and their total.
        on_image: called for each finished image with its index in `prompts` and the image.

    Raises:
        UserError: a setting is out of range, the model cannot generate images of that size, a prompt has syntax
            that is not supported.
        OutputError: the model's output is not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_settings(steps, eta, sampler, height, width, batch_size, precision)
    shape = latent_shape(model, height, width)
    numbers = range(len(prompts)) if numbers is None else numbers
    device = model.alphas_cumprod.device
    batches = _batches([chunk_count(model, prompt, prompt_syntax) for prompt in prompts], batch_size)
    total = steps * len(batches)
    images: list[Image.Image] = []
    with evaluating(model), model.ema_scope(), half_precision(precision, device):
        for batch, part in enumerate(batches):
            captions = prompts[part]
            generators = [noise_source(seed, number) for number in numbers[part]]
            blank = model.alphas_cumprod.new_empty((len(captions), *shape))
            guided = None if scale == 1.0 else negative_prompt
            condition, unconditional = conditions(model, captions, guided, prompt_syntax)
            latents, _ = SAMPLERS[sampler](model).sample(
                steps,
                len(captions),
                shape,
                conditioning=condition,
                callback=_counter(progress, batch * steps, total),
                eta=eta,
                x_T=gaussian(blank, generators) if x_T is None else x_T[part],
                unconditional_guidance_scale=scale,
                unconditional_conditioning=unconditional,
                generator=generators,
            )
            for prompt, decoded in zip(captions, model.decode_first_stage(latents), strict=True):
                if not decoded.isfinite().all():
                    raise OutputError(
                        f"the output for the prompt '{prompt[:80]}' is not finite (NaN or infinity) and would be a "
                        "black image; use full precision, other embeddings, or another copy of the checkpoint"
                    )
                images.append(to_pil(decoded))
                if on_image is not None:
                    on_image(len(images) - 1, images[-1])
    return images


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
) -> None:
    """Raise UserError for a setting of `generate` that is wrong for every model."""
    check_steps(steps)
    check_eta(eta)
    if sampler not in SAMPLERS:
        raise UserError(f'unknown sampler "{sampler}"; choose one of {", ".join(SAMPLERS)}')
    if eta != 0.0 and sampler != "ddim":
        raise UserError(
            f"eta is {eta}, but the sampler {sampler} is deterministic; use ddim, or leave eta at 0"
        )
    if precision not in PRECISIONS:
        raise UserError(f'unknown precision "{precision}"; choose one of {", ".join(PRECISIONS)}')
    for name, value in (("height", height), ("width", width), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"the {name} is {value}; it must be at least 1")


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
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < 1 or value % multiple):
            nearest = max(round(value / multiple), 1) * multiple
            raise UserError(
                f"{name} {value} is not a multiple of {multiple}, which this model needs; try {nearest}"
            )
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


def save_image(image: Image.Image, path: Path) -> Path:
    """Write an image atomically, in the format of the path's suffix; JPEG at high quality."""
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    return atomic_write(path, lambda file: image.save(file, FORMATS[path.suffix[1:]], **options))


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
