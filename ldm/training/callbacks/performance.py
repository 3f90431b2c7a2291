"""Speed: compiled and channels-last denoisers, and the time and memory of an epoch on a GPU."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from ldm.models.diffusion.ddpm import DDPM
from ldm.training.callbacks.progress import total_steps
from ldm.util import UserError, check_integer

logger = logging.getLogger(__name__)

# Compiling a denoiser of the size of Stable Diffusion's took more than four minutes on one H200 with 16 cores. It makes
# a GPU step of 0.1 to 0.2 s 1.15 times (RTX 3090) to 1.3 times (A100, 4 images) as fast (Hugging Face's figures for
# torch 2.0): some 0.025 s for each step.
LEAST_STEPS = 10_000
# A CUDA graph has nothing to compile. With a denoiser of the size of Stable Diffusion's at 512 x 512 on one H200, the
# first steps took 8 to 23 s longer, and a later one 60 to 90 ms instead of 110 to 144 (batch 1), 69 instead of 125
# (batch 4): it paid from 150, 460 and 630 steps on.
LEAST_GRAPH_STEPS = 700

# The backend of torch.compile that records the kernels of eager mode as CUDA graphs.
GRAPHS = "cudagraphs"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledDenoiser(Callback):
    """Compiles the denoiser's training step with `torch.compile`, if the run has at least `least_steps` left.

    For a shorter run, and on a CPU unless `least_steps` is given, it logs one line and does nothing. Previews and
    measurements are not compiled: they have other batch sizes and no gradients. Names in checkpoints do not change.
    What was compiled is kept in the user's cache (~/.cache/textual-inversion, or the folder of
    TORCHINDUCTOR_CACHE_DIR): a later run of the same model and batch size begins sooner. Whether it pays depends on
    model and machine: on two cores of a CPU a compiled step of the embedded model takes 0.9 to 1.1 times as long, and
    the run begins three minutes later, with what was kept eleven seconds (`benchmarks.compiled`).

    Args:
        least_steps: the fewest steps that are left of a run that is compiled; by default 10,000, of a graph 700, and
            on a CPU none is.
        backend, mode, dynamic: arguments of torch.compile.
        graph: on CUDA, record the kernels of the denoiser, forward and backward, as a CUDA graph, which is launched at
            once, and compile nothing: for a fast GPU or a small batch, where Python is slower than the GPU. Each size
            of batch has a graph, so the last batch of an epoch, if it is smaller, is recorded too; and it needs memory
            that no one else can use, for the activations and a second copy of the denoiser's weights (the size of
            Stable Diffusion v1, batch 1, bfloat16: 5.2 GB reserved, 3.2 without). It is torch's backend "cudagraphs"
            (with mode "reduce-overhead" the kernels are compiled too); another device ignores it.
    Raises:
        UserError: `graph` together with a `mode` or another `backend`.
    """

    def __init__(
        self,
        least_steps: int | None = None,
        backend: str = "inductor",
        mode: str | None = None,
        dynamic: bool | None = False,
        graph: bool = False,
    ) -> None:
        super().__init__()
        if least_steps is not None:
            check_integer(least_steps, "compiled: least_steps", minimum=0)
        given = {"mode": (mode, None), "backend": (backend, "inductor")}
        for name, (value, default) in given.items():
            if graph and value != default:
                raise UserError(
                    f"compiled: graph compiles nothing, and {name} is {value}; leave one of them out"
                )
        self.least_steps = least_steps
        self.graph = graph
        self.options: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}
        self._eager: Callable[..., Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        denoiser = _denoiser(pl_module)
        steps = total_steps(trainer)
        left = None if steps is None else steps - trainer.global_step
        if denoiser is None or self._eager is not None:
            return
        if self.least_steps is None and pl_module.device.type == "cpu":
            logger.info(
                "compiled: not used on a CPU, where it saves little or nothing; least_steps: 0 compiles all the same"
            )
            return
        graph = self.graph and pl_module.device.type == "cuda"
        least = LEAST_GRAPH_STEPS if graph else LEAST_STEPS
        if self.least_steps is not None:
            least = self.least_steps
        if left is not None and left < least:
            logger.info(
                "compiled: not used, because %s takes longer than it saves in %d steps (least_steps: %d)",
                "recording" if graph else "compiling",
                left,
                least,
            )
            return
        options = dict(self.options)
        if graph:
            options["backend"] = GRAPHS
        elif self.graph:
            logger.info("compiled: graph is ignored, because it is for CUDA devices")
        _keep_compiled()
        self._eager = eager = denoiser.forward
        compiled = torch.compile(eager, **options)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

        # An attribute of the instance, so that neither its class nor the names of its parameters change.
        setattr(denoiser, "forward", forward)  # noqa: B010  (a method is replaced on purpose)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._eager is not None:
            # A CUDA graph may now overwrite what it returned for the batch before.
            torch.compiler.cudagraph_mark_step_begin()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        denoiser = _denoiser(pl_module)
        if denoiser is not None and self._eager is not None:
            delattr(denoiser, "forward")
            self._eager = None


def _keep_compiled() -> None:
    """Let torch keep what it compiles in the user's cache: its default is the temporary folder, which is emptied.

    Torch itself sets the variable to that default as soon as its compiler is imported.
    """
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if not os.environ.get(CACHE_VARIABLE, default).startswith(default):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "textual-inversion" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.debug("compiled: nothing is kept in '%s': %s", folder, error)
        return
    os.environ[CACHE_VARIABLE] = str(folder)


class ChannelsLast(Callback):
    """Stores the denoiser's convolutions channels-last (NHWC), the layout that tensor cores of GPUs use.

    Results change by rounding only. It does not pay off on a CPU, where convolutions choose their own layout: with
    32x32 latents in bfloat16, a step of a denoiser of 220 million parameters takes 5 percent less time, one of 860
    million 1.4 times as much.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        denoiser = _denoiser(pl_module)
        if denoiser is not None:
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _denoiser(model: pl.LightningModule) -> nn.Module | None:
    return model.model.diffusion_model if isinstance(model, DDPM) else None


class CUDACallback(Callback):
    """Logs the time and peak memory of each epoch, averaged over the GPUs; without CUDA it only logs that once."""

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type != "cuda" and trainer.is_global_zero:
            logger.info("CUDACallback: not on a CUDA device, nothing to measure")
        # A run resumed in the middle of an epoch has no start of that epoch.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        figures = torch.tensor(
            [time.monotonic() - self._started, torch.cuda.max_memory_allocated(device) / 2**20], device=device
        )
        seconds, mebibytes = trainer.strategy.reduce(figures).tolist()
        if trainer.is_global_zero:
            logger.info("epoch %d: %.1f s, peak memory %.0f MiB", trainer.current_epoch, seconds, mebibytes)
