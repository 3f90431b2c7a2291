"""Where a placeholder's vectors begin: at an initializer's tokens, or somewhere in the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Vectors that begin at one token would have equal gradients if they were equal: this sets them apart.
REPEAT_NOISE = 0.1


def initial_vectors(table: Tensor, tokens: Sequence[int], count: int, seed: int) -> Tensor:
    """Draw [count, d] from an embedding table [V, d] in float32, on its device, the same for the same seed.

    `tokens` are spread over the vectors in order; a token used again is moved by REPEAT_NOISE of the table's
    deviation. Without tokens, vectors follow the mean and deviation of each dimension.
    """
    table = table.detach().float()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(count, table.shape[1], generator=generator, device="cpu").to(table.device)
    noise = noise * table.std(dim=0)
    if not tokens:
        return table.mean(dim=0) + noise
    rows = [tokens[place] for place in spread(len(tokens), count)]
    repeated = [[float(row in rows[:i])] for i, row in enumerate(rows)]
    vectors = table[torch.tensor(rows, device=table.device)]
    return vectors + REPEAT_NOISE * noise * torch.tensor(repeated, device=table.device)


def spread(length: int, count: int) -> list[int]:
    """`count` places in a list of `length`, in order and evenly: each of them if they are as many."""
    return [i * length // count for i in range(count)]
