"""The data module of a run: datasets from `target:` nodes, and loaders with reproducible samples."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm import random_state
from ldm.console import most_loader_processes, too_many_loaders
from ldm.util import UserError, check_integer, instantiate_from_config

logger = logging.getLogger(__name__)


class PositionSampler(Sampler[tuple[int, int]]):
    """Yields (index, epoch) pairs: the sample, and the epoch that seeds its random choices.

    Of `replicas` processes each takes every n-th position, so that their batches together are the batch of a single
    process; the order is padded from its start to a multiple of `replicas`. A `fixed` sampler stays in epoch 0.
    The next iteration, and only that one, skips `start` positions.
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
        """Set the epoch of the next iteration; Lightning calls this before each epoch."""
        if not self.fixed:
            self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        order: Sequence[int] = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.epoch) % 2**63)
            order = torch.randperm(self.length, generator=generator).tolist()
        positions = range(self.rank, len(self) * self.replicas, self.replicas)
        return iter([(order[position % self.length], self.epoch) for position in positions][start:])


class WrappedDataset(Dataset[Any]):
    """A torch dataset from any object with a length and items."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class SeededDataset(Dataset[Any]):
    """Makes a sample depend only on (index, epoch), the keys of PositionSampler, and not on the loading process.

    A dataset with a method `draw` does this itself, for the index epoch * length + index. For any other dataset the
    random generators are seeded for each sample.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.data = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: tuple[int, int]) -> Any:
        index, epoch = position
        if hasattr(self.data, "draw"):
            return self.data[epoch * len(self.data) + index]
        with random_state.isolated(self.seed, epoch, index, devices=False):
            return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """The data of a run: one `target:` node per split; after `setup`, `datasets` holds the datasets by split.

    Its state is the number of finished training batches, so that a resumed run continues with the next sample.

    Args:
        wrap: put a WrappedDataset around objects that are not torch datasets.
        num_workers: None: twice the batch size, but at most the number of processors.
        use_worker_init_fn: ignored, for old YAMLs; every sample has its own seed.
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
        check_integer(batch_size, "data.params.batch_size")
        check_integer(num_workers or 0, "data.params.num_workers", minimum=0)
        nodes = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.batch_size = batch_size
        if why := too_many_loaders(num_workers):
            raise UserError(f"data.params.num_workers {why}")
        most = most_loader_processes()
        self.num_workers = min(batch_size * 2, processors(), most) if num_workers is None else num_workers
        self.dataset_configs = {split: node for split, node in nodes.items() if node is not None}
        self.wrap = wrap
        self.shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.seed = torch.initial_seed() % 2**63
        self.datasets: dict[str, Any] = {}
        self._batches_done = 0
        if use_worker_init_fn:
            logger.debug("use_worker_init_fn is ignored: every sample has its own seed")

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets; a second call does nothing."""
        if self.datasets:
            return
        for split, node in self.dataset_configs.items():
            dataset = instantiate_from_config(node)
            if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
                raise UserError(f"the {split} dataset ({node['target']}) is empty; check its data_root")
            needs_wrapping = self.wrap and not isinstance(dataset, Dataset)
            self.datasets[split] = WrappedDataset(dataset) if needs_wrapping else dataset

    def delivered(self, replicas: int, limit: float | int | None) -> tuple[int, int] | None:
        """The size of a training batch of one of `replicas` processes, and how many an epoch has.

        A data set that is smaller than a batch gives what it has. None for a stream, whose length is not known.
        """
        dataset = self.datasets.get("train")
        if dataset is None or isinstance(dataset, IterableDataset):
            return None
        samples = -(-len(dataset) // replicas)
        batch = min(self.batch_size, samples)
        return batch, limited(-(-samples // batch), limit)

    def state_dict(self) -> dict[str, int]:
        if self.trainer is None:
            return {"batches_done": self._batches_done}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"batches_done": progress.total.processed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self._batches_done = state_dict["batches_done"]

    def train_dataloader(self) -> DataLoader[Any] | list[Any]:
        loader = self._loader("train", shuffle=True)
        # Only the first loader after a resume skips samples; later ones begin an epoch.
        done, self._batches_done = self._batches_done, 0
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, PositionSampler) and done:
            epoch, batch = divmod(done, self._batches_per_epoch(loader))
            loader.sampler.set_epoch(epoch)
            loader.sampler.start = batch * self.batch_size
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("validation", shuffle=self.shuffled["validation"])

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("test", shuffle=self.shuffled["test"])

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("predict", shuffle=False)

    def _batches_per_epoch(self, loader: DataLoader[Any]) -> int:
        return limited(len(loader), self.trainer.limit_train_batches if self.trainer is not None else 1.0)

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[Any] | list[Any]:
        if split not in self.datasets:
            return []
        dataset = self.datasets[split]
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Its own generator, because starting an epoch would otherwise draw from that of the training.
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


def limited(batches: int, limit: float | int | None) -> int:
    """The number of batches under Lightning's `limit_train_batches`: a number, a share, or None for all."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else max(1, int(limit * batches))


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
