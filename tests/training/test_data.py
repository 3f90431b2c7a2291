"""The data module: splits, batches, and reproducible samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ldm.training.data import DataModuleFromConfig, PositionSampler, SeededDataset, WrappedDataset
from ldm.util import UserError
from main import DataModuleFromConfig as Named


class Drawing(Dataset):
    """Items with their index and a draw of every generator."""

    def __init__(self, length=7):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"index": index, "drawn": torch.rand(()).item() + np.random.rand()}


class Plain:
    """A sequence that is not a torch dataset."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index


def module(**kwargs):
    data = DataModuleFromConfig(batch_size=2, num_workers=0)
    data.seed = 23
    data.datasets = {"train": Drawing(), "validation": Drawing(4)}
    for key, value in kwargs.items():
        setattr(data, key, value)
    return data


def drawn(loader):
    return [
        (int(i), float(d)) for batch in loader for i, d in zip(batch["index"], batch["drawn"], strict=True)
    ]


def test_main_has_the_same_class():
    assert Named is DataModuleFromConfig


def test_incomplete_batch_is_kept():
    data = module(batch_size=16)
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [7]
    assert len(data.val_dataloader()) == 1
    assert data.test_dataloader() == [] == data.predict_dataloader()


def test_each_epoch_has_each_sample_once_in_another_order():
    loader = module().train_dataloader()
    first = drawn(loader)
    loader.sampler.set_epoch(1)
    second = drawn(loader)
    assert sorted(i for i, _ in first) == sorted(i for i, _ in second) == list(range(7))
    assert [i for i, _ in first] != [i for i, _ in second]
    assert not {d for _, d in first} & {d for _, d in second}


def test_samples_depend_on_neither_workers_nor_other_draws():
    expected = drawn(module().train_dataloader())
    torch.rand(5)
    assert drawn(module().train_dataloader()) == expected
    assert drawn(module(num_workers=2).train_dataloader()) == expected


def test_loading_does_not_change_the_generators():
    loader = module().train_dataloader()
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    drawn(loader)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


@pytest.mark.parametrize("done", [1, 3, 4, 6])
def test_resumed_run_continues_with_the_next_batch(done):
    straight = module().train_dataloader()
    batches = []
    for epoch in range(2):
        straight.sampler.set_epoch(epoch)
        batches += [batch["drawn"] for batch in straight]
    resumed = module()
    resumed.load_state_dict({"batches_done": done})
    loader = resumed.train_dataloader()
    rest = [batch["drawn"] for batch in loader]
    expected = batches[done : 4 if done < 4 else 8]
    assert len(rest) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))
    assert len(list(resumed.train_dataloader())) == 4, "the next epoch is a whole one"


def test_validation_samples_never_change():
    loader = module().val_dataloader()
    first = drawn(loader)
    loader.sampler.set_epoch(5)
    assert drawn(loader) == first
    assert [i for i, _ in first] == [0, 1, 2, 3]


def test_replicas_share_the_batch_of_one_process():
    alone = [i for i, _ in PositionSampler(8, shuffle=True, seed=3)]
    parts = [[i for i, _ in PositionSampler(8, shuffle=True, seed=3, replicas=2, rank=r)] for r in (0, 1)]
    assert [i for pair in zip(*parts, strict=True) for i in pair] == alone
    odd = [PositionSampler(7, shuffle=False, seed=3, replicas=2, rank=r) for r in (0, 1)]
    assert [len(list(sampler)) for sampler in odd] == [4, 4] == [len(sampler) for sampler in odd]


def test_dataset_with_draw_gets_indices_beyond_its_length():
    class Counting(Drawing):
        def draw(self, index):
            return index

        def __getitem__(self, index):
            return self.draw(index)

    assert SeededDataset(Counting(5), 0)[3, 2] == 13


def test_wrap():
    node = {"target": f"{__name__}.Plain"}
    data = DataModuleFromConfig(2, train=node, wrap=True, num_workers=0)
    data.setup()
    assert isinstance(data.datasets["train"], WrappedDataset)
    assert len(data.datasets["train"]) == 3
    assert data.datasets["train"][1] == 1


@pytest.mark.parametrize(
    "params", [{"batch_size": 0}, {"batch_size": "4"}, {"batch_size": 1, "num_workers": -1}]
)
def test_invalid_numbers(params):
    with pytest.raises(UserError, match="whole number of at least"):
        DataModuleFromConfig(**params)


@pytest.mark.done_or_said
@pytest.mark.parametrize(
    ("batch_size", "replicas", "limit", "expected"),
    [
        (2, 1, 1.0, (2, 3)),
        (4, 1, 1.0, (4, 2)),
        (64, 1, 1.0, (6, 1)),
        (64, 4, 1.0, (2, 1)),
        (1, 2, 0.5, (1, 1)),
        (1, 1, 4, (1, 4)),
        (1, 1, None, (1, 6)),
    ],
)
def test_batches_that_are_delivered(numbers, batch_size, replicas, limit, expected):
    data = DataModuleFromConfig(batch_size)
    data.datasets = {"train": numbers(6)}
    assert data.delivered(replicas, limit) == expected
    data.datasets = {}
    assert data.delivered(replicas, limit) is None


@pytest.mark.refused_first
def test_more_loader_processes_than_files_may_be_open_are_refused(monkeypatch) -> None:
    """Such a run would wait for ever for batches that nobody can hand over."""
    monkeypatch.setattr("ldm.console.raise_file_limit", lambda: 64 + 2 * 32)
    with pytest.raises(
        UserError, match="num_workers is 3, and the limit of open files has room for 2.*ulimit"
    ):
        DataModuleFromConfig(batch_size=4, num_workers=3)
    assert DataModuleFromConfig(batch_size=4, num_workers=2).num_workers == 2
    monkeypatch.setattr("ldm.console.raise_file_limit", lambda: 64)
    assert DataModuleFromConfig(batch_size=4).num_workers == 0
