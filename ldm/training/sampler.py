"""The order of training samples as a function of seed, epoch and position, so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PositionSampler(Sampler[tuple[int, int]]):
    """Yields (index, epoch): which sample to take, and in which epoch its random choices are made.

    With several replicas each takes every n-th position, so that their batches together are the batch of one
    process; the order is padded from its start to a multiple of them. A fixed sampler stays in epoch 0.
    `start` positions of the next iteration are left out, once.
    """

    def __init__(
        self, length: int, *, shuffle: bool, seed: int, replicas: int = 1, rank: int = 0, fixed: bool = False
    ) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.replicas = replicas
        self.rank = rank
        self.fixed = fixed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-self.length // self.replicas)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if not self.fixed:
            self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        order = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.epoch) % 2**63)
            order = torch.randperm(self.length, generator=generator).tolist()
        mine = range(self.rank, len(self) * self.replicas, self.replicas)
        return iter([(order[place % self.length], self.epoch) for place in mine][start:])
