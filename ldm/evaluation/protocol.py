"""CLIP-I and CLIP-T as in "An Image is Worth One Word": how near pictures are to the concept's, and to the prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ldm.generate.embeddings import whole_word

# Pictures per prompt, DDIM steps and guidance with which the paper's figures were made.
SAMPLES, STEPS, SCALE = 64, 50, 5.0


def similarity(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Two readings of the likeness of unit features [N, d] and [M, d], each -1 to 1.

    "pairwise" is the mean over all pairs of cosines, as the original's code has it; "averaged" is the cosine of the
    averaged features, as the paper's text has it, and always the larger where it is positive.
    """
    return {
        "pairwise": float((ours @ theirs.T).mean()),
        "averaged": float(F.cosine_similarity(ours.mean(0), theirs.mean(0), dim=0)),
    }


def without_placeholders(prompt: str, placeholders: Iterable[str]) -> str:
    """The prompt that CLIP-T compares with: "a photo of * on the moon" becomes "a photo of on the moon"."""
    for name in sorted(placeholders, key=len, reverse=True):
        prompt = re.sub(whole_word(name), " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())
