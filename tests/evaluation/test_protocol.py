from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.evaluation.measures import SAMPLES, SCALE, STEPS, similarity, without_placeholders


def test_both_readings_of_the_paper() -> None:
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    theirs = torch.tensor([[1.0, 0.0]])
    assert similarity(ours, theirs) == pytest.approx({"pairwise": 0.5, "averaged": 0.5**0.5})
    same = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [float(a @ b) for a in same for b in same]
    assert similarity(same, same) == pytest.approx({"pairwise": sum(pairs) / 49, "averaged": 1.0}, abs=1e-6)


@pytest.mark.parametrize(
    "prompt, names, text",
    [
        ("A photo of * on the moon", ["*"], "A photo of on the moon"),
        ("a photo of <Cat>, small", ["<cat>"], "a photo of , small"),
        ("cat in a category", ["cat"], "in a category"),
        ("a <cat> and a <cat-2>", ["<cat>", "<cat-2>"], "a and a"),
    ],
)
def test_the_text_is_the_prompt_without_the_word(prompt, names, text) -> None:
    assert without_placeholders(prompt, names) == text


def test_the_papers_settings() -> None:
    assert (SAMPLES, STEPS, SCALE) == (64, 50, 5.0)
