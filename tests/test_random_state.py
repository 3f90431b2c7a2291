"""The random state of a process."""

from __future__ import annotations

import numpy as np
import torch

from ldm import random_state


def test_capture_isolate_and_restore():
    state = random_state.capture()
    drawn = torch.rand(2), np.random.rand(2)
    with random_state.isolated(1, 2):
        inside = torch.rand(2)
    random_state.restore(state)
    with random_state.isolated(1, 2):
        assert torch.equal(torch.rand(2), inside)
    assert torch.equal(torch.rand(2), drawn[0])
    assert (np.random.rand(2) == drawn[1]).all()
