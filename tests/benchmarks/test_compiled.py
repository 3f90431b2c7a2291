"""The arithmetic of the benchmark of torch.compile."""

from __future__ import annotations

import pytest

from benchmarks.compiled import EMPTY, PLAIN, sooner_from


@pytest.mark.parametrize(
    ("begins", "step", "text"),
    [
        # 103 s for compiling, 0.05 s less for each step, of which the beginnings have 60.
        ((6.0, 106.0), 0.05, "2,060 steps"),
        ((6.0, 3.0), 0.05, "0 steps"),
        ((6.0, 4.0), 0.05, "20 steps"),
        ((6.0, 106.0), 0.1, "never"),
        ((6.0, 106.0), 0.2, "never"),
    ],
)
def test_the_steps_from_which_a_compiled_run_is_sooner(begins, step: float, text: str) -> None:
    found = sooner_from(60, {PLAIN: [begins[0]], EMPTY: [begins[1]]}, {PLAIN: [0.1], EMPTY: [step]}, EMPTY)
    assert found == text
