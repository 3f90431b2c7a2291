"""Pictures of several prompts, drawn together."""

from __future__ import annotations

import numpy as np

from ldm.evaluation.evaluate import Sampling
from tests.golden_record import Golden

PROMPTS = ["a photo", "a painting of a dog", "sculpture"]


def test_prompts_drawn_together_are_those_drawn_alone() -> None:
    model = Golden("clip_one_vector").model()
    counted = []
    together = list(Sampling(steps=2, batch_size=5).draw(model, PROMPTS, 2, lambda: counted.append(1)))
    assert [len(pictures) for pictures in together] == [2, 2, 2] and len(counted) == 6
    for prompt, pictures in zip(PROMPTS, together, strict=True):
        (alone,) = Sampling(steps=2, batch_size=1).draw(model, [prompt], 2)
        for one, other in zip(pictures, alone, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert not np.array_equal(np.asarray(together[0][0]), np.asarray(together[0][1]))
    assert not np.array_equal(np.asarray(together[0][0]), np.asarray(together[1][0]))
