"""Datasets of a run, made from `target:` nodes, behind loaders whose samples do not depend on when they are drawn."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm import random_state
from ldm.util import UserError, instantiate_from_config

logger = logging.getLogger(__name__)


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


class WrappedDataset(Dataset):
    """Makes a torch dataset of any object with a length and items."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class SeededDataset(Dataset):
    """Makes a sample depend on its index and the epoch alone, whichever process loads it and whenever.

    Items are asked for by (index, epoch), as PositionSampler yields them. A dataset with a method `draw` keeps
    this promise itself, for indices that run on beyond its length; for others the generators are seeded.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.data = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        index, epoch = place
        if hasattr(self.data, "draw"):
            return self.data[epoch * len(self.data) + index]
        with random_state.isolated(self.seed, epoch, index, devices=False):
            return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data of a run from one node per split.

    `num_workers` defaults to twice the batch size, but no more than the processors at hand. `wrap` puts a
    WrappedDataset around what is no torch dataset. `use_worker_init_fn` is accepted for old YAMLs: samples have
    seeds of their own by now. After `setup`, `datasets` holds the datasets by split. Its state is the number of
    training batches that are done, from which a resumed run goes on with the very next sample.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
    ) -> None:
        super().__init__()
        for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers or 0, 0)):
            if not isinstance(number, int) or number < least:
                raise UserError(
                    f"data.params.{name} is {number!r}; it must be a whole number from {least} on"
                )
        nodes = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.batch_size = batch_size
        self.num_workers = min(batch_size * 2, processors()) if num_workers is None else num_workers
        self.dataset_configs = {split: node for split, node in nodes.items() if node is not None}
        self.wrap = wrap
        self.shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.seed = torch.initial_seed() % 2**63
        self.datasets: dict[str, Any] = {}
        self._batches_done = 0
        if use_worker_init_fn:
            logger.debug("use_worker_init_fn has nothing left to do: workers are seeded per sample")

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets, once."""
        if self.datasets:
            return
        for split, node in self.dataset_configs.items():
            dataset = instantiate_from_config(node)
            if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
                raise UserError(f"the {split} dataset ({node['target']}) is empty; check its data_root")
            needs_wrapping = self.wrap and not isinstance(dataset, Dataset)
            self.datasets[split] = WrappedDataset(dataset) if needs_wrapping else dataset

    def state_dict(self) -> dict[str, int]:
        if self.trainer is None:
            return {"batches_done": self._batches_done}
        return {"batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._batches_done = state_dict["batches_done"]

    def train_dataloader(self) -> DataLoader | list:
        loader = self._loader("train", shuffle=True)
        sampler = getattr(loader, "sampler", None)
        # Once: a loader that the Trainer asks for later, for another epoch, begins at its beginning.
        done, self._batches_done = self._batches_done, 0
        if isinstance(sampler, PositionSampler) and done:
            epoch, batch = divmod(done, self._batches_per_epoch(loader))
            sampler.set_epoch(epoch)
            sampler.start = batch * self.batch_size
        return loader

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("validation", shuffle=self.shuffled["validation"])

    def test_dataloader(self) -> DataLoader | list:
        return self._loader("test", shuffle=self.shuffled["test"])

    def predict_dataloader(self) -> DataLoader | list:
        return self._loader("predict", shuffle=False)

    def _batches_per_epoch(self, loader: DataLoader) -> int:
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        if limit is None:
            return len(loader)
        return min(limit, len(loader)) if isinstance(limit, int) else max(1, int(limit * len(loader)))

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader | list:
        if split not in self.datasets:
            return []
        dataset = self.datasets[split]
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Of its own, so that starting an epoch takes nothing from the generator that training draws from.
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, **common)
        replicas, rank = (
            (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        )
        sampler = PositionSampler(
            len(dataset),
            shuffle=shuffle,
            seed=self.seed,
            replicas=replicas,
            rank=rank,
            fixed=split != "train",
        )
        return DataLoader(SeededDataset(dataset, self.seed), sampler=sampler, **common)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
