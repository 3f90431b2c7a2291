"""A fit that breaks off."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from ldm.training.fitting import alone_at_last, is_out_of_memory
from ldm.training.signals import Interrupted


@pytest.mark.parametrize("error", [OSError("disk full"), Interrupted(signal.SIGINT)], ids=["disk", "Ctrl-C"])
@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_takes_the_others_with_it(first: bool, error: BaseException) -> None:
    sent: list[int] = []
    launcher = SimpleNamespace(kill=sent.append)
    trainer = SimpleNamespace(is_global_zero=first, strategy=SimpleNamespace(launcher=launcher))
    with alone_at_last(trainer):
        pass
    assert not sent
    with pytest.raises(type(error)), alone_at_last(trainer):
        raise error
    assert len(sent) == (1 if first else 0)


def test_a_single_process_has_no_launcher() -> None:
    trainer = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(launcher=None))
    with pytest.raises(OSError), alone_at_last(trainer):
        raise OSError("disk full")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ],
)
def test_what_devices_say_of_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
