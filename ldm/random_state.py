"""The random state of a process: capture, restore, seed, and isolate a block of code."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in types that torch.load(weights_only=True) accepts."""
    version, internal, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        **({"mps": [torch.mps.get_rng_state()]} if torch.backends.mps.is_available() else {}),
    }


def restore(state: Mapping[str, Any]) -> None:
    """Restore a state of `capture`; a CUDA state goes to the current device, whatever its index."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    if state.get("mps") and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0])


def seed_all(*numbers: int, devices: bool = True) -> None:
    """Seed the generators of this process from numbers, which may be consecutive; with `devices`, also CUDA's."""
    python, numpy, torch_seed = np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(3)
    random.seed(int(python))
    np.random.seed(int(numpy))
    if devices:
        torch.manual_seed(int(torch_seed))
    else:
        torch.default_generator.manual_seed(int(torch_seed))


@contextmanager
def isolated(*numbers: int, devices: bool = True) -> Iterator[None]:
    """Seed the generators for this block and restore their states afterwards.

    Training therefore draws the same numbers with and without previews and validation.
    """
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # A CUDA seed set before CUDA is initialized would be applied later and could not be undone.
    cuda = torch.cuda.get_rng_state_all() if devices and torch.cuda.is_initialized() else []
    mps = torch.mps.get_rng_state() if devices and torch.backends.mps.is_available() else None
    seed_all(*numbers, devices=bool(cuda) or mps is not None)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
