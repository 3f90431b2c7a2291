"""The arithmetic of the benchmark of torch.compile."""

from __future__ import annotations

import pytest

from benchmarks.compiled import EMPTY, PLAIN, sooner_from


@pytest.mark.parametrize(
    ("begins", "step", "text"),
    [
        ((2.0, 102.0), 0.05, "2,000 steps"),  # 100 s more, 0.05 s less for each step
        ((2.0, 2.0), 0.05, "0 steps"),
        ((3.0, 2.0), 0.05, "0 steps"),
        ((2.0, 102.0), 0.1, "never"),
        ((2.0, 102.0), 0.2, "never"),
    ],
)
def test_the_steps_from_which_a_compiled_run_is_sooner(begins, step: float, text: str) -> None:
    assert sooner_from({PLAIN: [begins[0]], EMPTY: [begins[1]]}, {PLAIN: [0.1], EMPTY: [step]}, EMPTY) == text
