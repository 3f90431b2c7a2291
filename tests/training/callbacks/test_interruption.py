"""Stop requests during the optimizer's update."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from ldm.console import Interrupted
from ldm.training.callbacks.interruption import Requests, StepGuard


def test_second_stop_request_waits_for_the_update() -> None:
    requests = Requests()
    guard, hook = StepGuard(requests), (SimpleNamespace(), SimpleNamespace())
    requests.stepping = True
    requests.on_stop(signal.SIGINT)
    guard.on_before_optimizer_step(*hook, None)
    requests.on_stop(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        guard.on_train_batch_end(*hook, None, None, 0)
    assert stop.value.exit_code == 130
    with pytest.raises(Interrupted):
        requests.on_stop(signal.SIGTERM)


def test_one_stop_request_waits_for_saving() -> None:
    requests = Requests()
    guard, hook = StepGuard(requests), (SimpleNamespace(), SimpleNamespace())
    requests.stepping = True
    guard.on_before_optimizer_step(*hook, None)
    requests.on_stop(signal.SIGINT)
    guard.on_train_batch_end(*hook, None, None, 0)
    assert requests.stop == signal.SIGINT and not requests.updating


def test_failed_step_ends_the_update() -> None:
    requests = Requests()
    guard, hook = StepGuard(requests), (SimpleNamespace(), SimpleNamespace())
    guard.on_before_optimizer_step(*hook, None)
    guard.on_exception(*hook, RuntimeError())
    assert not requests.updating
