"""Several vectors in place of one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """For each of P placeholders its id, how many vectors it shows, and the row of its first one: all [P]."""

    ids: Tensor
    widths: Tensor
    offsets: Tensor

    @classmethod
    def build(
        cls, ids: Sequence[int], widths: Sequence[int], rows: Sequence[int], device: torch.device
    ) -> Layout:
        """Lay out placeholders whose vectors follow one another in one table, `rows` of it for each."""
        offsets = [sum(rows[:i]) for i in range(len(rows))]
        return cls(*(torch.tensor(values, device=device) for values in (ids, widths, offsets)))


def insert_vectors(tokens: Tensor, embedded: Tensor, vectors: Tensor, layout: Layout) -> Tensor:
    """Show vectors [R, d] in place of the placeholders among tokens [B, L], embedded [B, L, d].

    A placeholder of several vectors pushes what follows to the right; what passes L falls off. Returns a new
    [B, L, d]; nothing is read back from the device.
    """
    matches = tokens.unsqueeze(-1) == layout.ids  # [B, L, P]
    found, which = matches.any(dim=-1), matches.int().argmax(dim=-1)  # [B, L]
    spans = torch.where(found, layout.widths[which], 1)
    ends = spans.cumsum(dim=1)
    places = torch.arange(ends.shape[1], device=ends.device).repeat(ends.shape[0], 1)
    source = torch.searchsorted(ends, places, right=True)  # the token that each place of the result shows
    nth = places - (ends - spans).gather(1, source)
    found = found.gather(1, source)
    rows = torch.where(found, layout.offsets[which].gather(1, source) + nth, 0)
    shifted = embedded.gather(1, source.unsqueeze(-1).expand_as(embedded))
    return torch.where(found.unsqueeze(-1), vectors.to(embedded.dtype)[rows], shifted)


def place_after_insertion(tokens: Tensor, places: Tensor, widths: Mapping[int, int]) -> Tensor:
    """Where the tokens at places [B] of prompts [B, L] stand once placeholders show their vectors.

    `widths` says how many vectors each placeholder's id shows. What passes L is given as if there were room.
    """
    before = torch.arange(tokens.shape[1], device=tokens.device) < places.unsqueeze(-1)
    for token, width in widths.items():
        places = places + (width - 1) * ((tokens == token) & before).sum(dim=-1)
    return places
