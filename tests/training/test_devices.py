"""What --gpus means, with and without CUDA."""

import logging

import pytest
import torch

from ldm.training.trainer import Devices, choose_devices, parse_gpus, processes
from ldm.util import UsageError, UserError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0,", [0]),
        ("0", 0),
        ("2", 2),
        ("-1", -1),
        ("0,1", [0, 1]),
        (0, 0),
        ([1], [1]),
        (None, None),
        ("1,", [1]),
        ("[0]", [0]),
        ("[0, 1]", [0, 1]),
    ],
)
def test_words(text, meaning):
    assert parse_gpus(text) == meaning


@pytest.mark.parametrize("text", ["all", "0;1", "0,x", {"a": 1}])
def test_nonsense_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not understood"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "accelerator", "count"),
    [
        ("0,", "cuda", 1),
        ("0", "cpu", 1),
        ("2", "cuda", 2),
        ("-1", "cuda", 2),
        ("0,1", "cuda", 2),
        (None, "cuda", 1),
    ],
)
def test_with_cuda(two_gpus, text, accelerator, count):
    chosen = choose_devices(text)
    assert (chosen.accelerator, chosen.count) == (accelerator, count)


@pytest.mark.parametrize("text", ["3", "2,", "0,5"])
def test_a_gpu_that_is_not_there(two_gpus, text):
    with pytest.raises(UserError, match="this machine has 2"):
        choose_devices(text)


@pytest.mark.parametrize(("text", "lines"), [("0,", 1), ("-1", 1), ("0", 0), (None, 0)])
def test_without_cuda_one_line(no_gpu, caplog, text, lines):
    caplog.set_level(logging.INFO, logger="ldm")
    assert choose_devices(text).accelerator == "cpu"
    assert len(caplog.messages) == lines


def test_the_cpu_is_taken_at_its_word(two_gpus, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    for gpus in (None, "0,", "0,1", "-1"):
        assert choose_devices(gpus, "cpu") == Devices("cpu", 1)
    assert choose_devices("0,", "gpu") == choose_devices("0,", "ddp") == Devices("cuda", [0])
    assert not caplog.messages


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"gpus": "0,"}, 1),
        ({"gpus": "0,1"}, 2),
        ({"gpus": "-1"}, 2),
        ({"gpus": "0,", "num_nodes": 3}, 3),
        ({"devices": 2, "accelerator": "cpu"}, 2),
        ({"devices": "0,1", "num_nodes": 2}, 4),
        ({"devices": "auto"}, 1),
    ],
)
def test_processes(trainer, count):
    assert processes(trainer) == count


def test_processes_of_chosen_devices():
    assert processes({"num_nodes": 2}, Devices("cuda", [0, 1])) == 4
    assert processes({"devices": 3}, Devices("cpu", 1)) == 3
