"""Learned vectors of a length that the text encoder knows."""

from __future__ import annotations

from torch import Tensor

from ldm.util import UserError

KINDS = (None, "fixed", "limited")


class NormControl:
    """Holds vectors to `ratio` times the mean norm of a vocabulary.

    Textual inversion lets norms grow to many times those of words, and prompts are then followed badly; Directional
    Textual Inversion (Kim et al., ICLR 2026) writes a vector as m v with m the vocabulary's mean norm and learns only
    the direction v on the unit sphere. `fixed` is that as a projection after each optimizer step, which works with
    any optimiser; the paper finds its own step along the sphere better still (its ablation: text .463 and likeness
    .335 with AdamW and projection, .522 and .450 with its step). `limited` projects only what is longer, for words
    differ in length.
    """

    def __init__(self, kind: str | None, ratio: float = 1.0) -> None:
        if kind not in KINDS:
            raise UserError(f"norm_control is '{kind}'; use fixed, limited or null")
        if not ratio > 0:
            raise UserError(f"norm_ratio is {ratio}; it must be above 0")
        self.kind = kind
        self.ratio = float(ratio)
        self.norm = 1.0

    def measure(self, table: Tensor) -> None:
        """Take the mean norm from an embedding table [V, d]."""
        if self.kind is not None:
            self.norm = self.ratio * float(table.detach().float().norm(dim=1).mean())

    def applied(self, vectors: Tensor) -> Tensor:
        """The vectors [N, d] at the length that is allowed; a vector of zeros has no direction and stays."""
        if self.kind is None:
            return vectors
        factor = self.norm / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return vectors * (factor.clamp(max=1.0) if self.kind == "limited" else factor)
