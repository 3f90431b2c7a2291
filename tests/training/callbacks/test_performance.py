"""Compiled and channels-last denoisers, and the CUDA callback."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.training.callbacks import performance as performance
from ldm.training.callbacks.performance import ChannelsLast, CompiledDenoiser, CUDACallback
from ldm.util import UserError
from tests.golden_record import Golden
from tests.training.runs import fit_line

DEFAULT = os.path.join(tempfile.gettempdir(), "torchinductor_someone")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of this test in which torch keeps what it compiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(performance.CACHE_VARIABLE, DEFAULT)  # as importing torch's compiler does
    return tmp_path / "textual-inversion" / "compiled"


@pytest.fixture
def model():
    return Golden("clip_one_vector").model()


def trainer_of(steps: int = 5000, done: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        max_steps=steps, max_epochs=None, global_step=done, estimated_stepping_batches=steps
    )


def output(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.channels, 8, 8, generator=generator)
    return model.apply_model(x, torch.tensor([3, 500]), model.get_learned_conditioning(["a *"] * 2))


def test_only_training_is_compiled(model, monkeypatch) -> None:
    used = []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: lambda *a, **k: used.append(options) or function(*a, **k),
    )
    names, before = list(model.state_dict()), output(model).detach()
    callback = CompiledDenoiser(2000, mode="max-autotune")
    callback.on_train_start(trainer_of(), model)
    assert torch.equal(output(model), before)
    assert used == [{"backend": "inductor", "mode": "max-autotune", "dynamic": False}]
    with torch.no_grad():
        output(model)
    assert len(used) == 1
    assert list(model.state_dict()) == names, "no _orig_mod"
    callback.teardown(trainer_of(), model, "fit")
    output(model)
    assert len(used) == 1 and "forward" not in vars(model.model.diffusion_model)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns of what it does itself
def test_compiled_gradient(model) -> None:
    (vectors,) = model.embedding_manager.embedding_parameters()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        output(model).square().mean().backward()
        return vectors.grad.clone()

    expected = gradient()
    callback = CompiledDenoiser(2000, backend="eager")
    callback.on_train_start(trainer_of(), model)
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-6)
    callback.teardown(trainer_of(), model, "fit")


def test_short_run_is_not_compiled(model, caplog) -> None:
    caplog.set_level(logging.INFO, logger=performance.__name__)
    CompiledDenoiser(2000).on_train_start(trainer_of(5000, done=3500), model)
    assert caplog.messages == [
        "compiled: not used, because compiling takes longer than it saves in 1500 steps (least_steps: 2000)"
    ]
    assert "forward" not in vars(model.model.diffusion_model)
    CompiledDenoiser(2000).on_train_start(trainer_of(), torch.nn.Identity())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_by_default_a_cpu_compiles_nothing(model, monkeypatch, caplog, device: str) -> None:
    caplog.set_level(logging.INFO, logger=performance.__name__)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(1) or function)
    monkeypatch.setattr(type(model), "device", torch.device(device))
    CompiledDenoiser().on_train_start(trainer_of(10_000), model)
    assert compiled == [1] * (device == "cuda")
    assert (caplog.messages == []) == (device == "cuda")
    assert device == "cuda" or caplog.messages[0].startswith("compiled: not used on a CPU")
    CompiledDenoiser().on_train_start(trainer_of(9999), model)
    assert "9999 steps (least_steps: 10000)" in caplog.text or device == "cpu"


def test_what_is_compiled_is_kept_in_the_users_cache(model, cache, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    callback = CompiledDenoiser(2000)
    callback.on_train_start(trainer_of(), model)
    assert cache.is_dir() and os.environ[performance.CACHE_VARIABLE] == str(cache)
    callback.teardown(trainer_of(), model, "fit")
    monkeypatch.setenv(performance.CACHE_VARIABLE, "/elsewhere")
    callback.on_train_start(trainer_of(), model)
    assert os.environ[performance.CACHE_VARIABLE] == "/elsewhere"


def test_a_cache_that_cannot_be_made_is_not_used(model, cache, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cache.parent.write_text("a file in its place")
    CompiledDenoiser(2000).on_train_start(trainer_of(), model)
    assert os.environ[performance.CACHE_VARIABLE] == DEFAULT


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cudagraphs"), ("cpu", "inductor")])
def test_a_graph_of_the_step_is_for_cuda(model, monkeypatch, caplog, device: str, backend: str) -> None:
    caplog.set_level(logging.INFO, logger=performance.__name__)
    backends, marks = [], []
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: backends.append(options["backend"]) or function
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(type(model), "device", torch.device(device))
    callback = CompiledDenoiser(2000, graph=True)
    callback.on_train_batch_start(trainer_of(), model, {}, 0)
    assert not marks, "nothing is compiled"
    callback.on_train_start(trainer_of(), model)
    callback.on_train_batch_start(trainer_of(), model, {}, 0)
    assert backends == [backend] and marks == [1]
    assert (caplog.messages == ["compiled: graph is ignored, because it is for CUDA devices"]) == (
        device == "cpu"
    )
    for name in ("mode", "backend"):
        with pytest.raises(UserError, match=f"compiles nothing, and {name} is eager; leave one of them out"):
            CompiledDenoiser(graph=True, **{name: "eager"})


@pytest.mark.parametrize(("graph", "left", "compiled"), [(True, 699, 0), (True, 700, 1), (False, 9999, 0)])
def test_a_graph_pays_in_a_shorter_run(model, monkeypatch, graph: bool, left: int, compiled: int) -> None:
    found = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: found.append(1) or function)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    CompiledDenoiser(graph=graph).on_train_start(trainer_of(left), model)
    assert len(found) == compiled


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_graph_gives_the_gradients_of_the_step() -> None:
    model = Golden("clip_one_vector").model().cuda()
    (vectors,) = model.embedding_manager.embedding_parameters()

    def gradients(callback: CompiledDenoiser | None) -> list[torch.Tensor]:
        found = []
        for step in range(6):  # torch records the graph at the second or third
            if callback is not None:
                callback.on_train_batch_start(trainer_of(), model, {}, step)
            model.zero_grad()
            x = torch.randn(2, model.channels, 8, 8, generator=torch.Generator().manual_seed(step)).cuda()
            times = torch.tensor([3, 500 + step], device="cuda")
            condition = model.get_learned_conditioning(["a *"] * 2)
            model.apply_model(x, times, condition).square().mean().backward()
            found.append(vectors.grad.clone())
        return found

    expected = gradients(None)
    callback = CompiledDenoiser(2000, graph=True)
    callback.on_train_start(trainer_of(), model)
    for compiled, eager in zip(gradients(callback), expected, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
    callback.teardown(trainer_of(), model, "fit")


def test_channels_last(model) -> None:
    before = output(model).detach()
    ChannelsLast().on_train_start(trainer_of(), model)
    assert model.model.diffusion_model.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output(model).detach(), before, rtol=1e-4, atol=1e-4)


def test_invalid_least_steps() -> None:
    with pytest.raises(UserError, match="least_steps is -1"):
        CompiledDenoiser(least_steps=-1)


def test_cuda_callback_on_a_cpu(line, numbers, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    fit_line(line, numbers, tmp_path, [CUDACallback()])
    assert [message for message in caplog.messages if "CUDA" in message] == [
        "CUDACallback: not on a CUDA device, nothing to measure"
    ]
