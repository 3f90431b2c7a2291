"""Previews: when, which files, fixed prompts, and no effect on the training."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from ldm.models.diffusion import previews
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.training.callbacks.image_logger import ImageLogger, filled_prompts, prompt_sheet
from ldm.util import UserError
from tests.golden_record import Golden
from tests.training.runs import fit_line, start, state_of


class TestImageLogger:
    def due(self, steps=10, **options):
        logger = ImageLogger(**{"batch_frequency": 4, "max_images": 2, "increase_log_steps": False} | options)
        found = []
        for step in range(1, steps + 1):
            if logger.is_due("train", step, (step - 1) % 5):
                found.append(step)
                logger._last_step["train"] = step
        return found

    def test_steps(self):
        assert self.due() == [4, 8]
        assert self.due(increase_log_steps=True) == [1, 2, 4, 8]
        assert self.due(log_first_step=True) == [1, 4, 8]
        assert self.due(log_on_batch_idx=True) == [4, 9]
        assert self.due(disabled=True) == self.due(max_images=0) == self.due(batch_frequency=0) == []

    def test_one_preview_per_accumulated_step(self, line, numbers, tmp_path):
        logger = ImageLogger(batch_frequency=1, max_images=2)
        fit_line(line, numbers, tmp_path, [logger], steps=2, accumulate_grad_batches=2)
        assert line.previews == 2

    @pytest.mark.parametrize(
        ("options", "steps", "previews"),
        [
            ({"batch_frequency": 100}, 3, 1),
            ({"batch_frequency": 100, "increase_log_steps": True}, 3, 2),  # at 1 and 2
            ({"batch_frequency": 2}, 3, 1),
            ({"batch_frequency": 0}, 3, 0),
            ({"batch_frequency": 100, "disabled": True}, 3, 0),
        ],
    )
    def test_a_run_shorter_than_the_frequency_ends_with_one(
        self, line, numbers, tmp_path, options, steps, previews
    ):
        logger = ImageLogger(**{"max_images": 2, "increase_log_steps": False} | options)
        fit_line(line, numbers, tmp_path, [logger], steps=steps)
        assert line.previews == previews

    def test_also_one_that_ends_with_its_epochs_but_none_that_is_stopped(self, line, numbers, tmp_path):
        epoch = ImageLogger(batch_frequency=100, max_images=2, increase_log_steps=False)
        fit_line(line, numbers, tmp_path, [epoch], steps=100, max_epochs=1)
        assert line.previews == 1
        stopped = ImageLogger(batch_frequency=100, max_images=2, increase_log_steps=False)
        stopped.requests.stop = signal.SIGTERM
        fit_line(line, numbers, tmp_path, [stopped], steps=3)
        assert line.previews == 1

    def test_file_names_of_the_original(self, line, numbers, tmp_path):
        fit_line(
            line, numbers, tmp_path, [ImageLogger(batch_frequency=3, max_images=2)], steps=6, validate=True
        )
        train_files = sorted(path.name for path in (tmp_path / "images" / "train").iterdir())
        assert "slope_gs-000003_e-000000_b-000002.jpg" in train_files
        assert "slope_gs-000006_e-000001_b-000002.jpg" in train_files
        assert [path.name for path in (tmp_path / "images" / "val").iterdir()]
        with Image.open(tmp_path / "images" / "train" / train_files[0]) as grid:
            assert grid.size[0] < 2 * 8 + 10, "two of the four images"

    @pytest.mark.done_or_said
    def test_a_black_preview_is_not_saved_and_said(self, line, numbers, tmp_path, monkeypatch, caplog):
        shown = {"slope": torch.full((1, 3, 8, 8), float("nan")), "inputs": torch.zeros(1, 3, 8, 8)}
        monkeypatch.setattr(type(line), "log_images", lambda self, batch, N: dict(shown))
        logger = ImageLogger(batch_frequency=2, max_images=2, increase_log_steps=False)
        logger.model_name = "'m.ckpt'"
        fit_line(line, numbers, tmp_path, [logger], steps=2)
        (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("ldm")]
        assert warning.startswith("step 2: no preview of slope: the output of 'm.ckpt' is not finite")
        assert [path.name[:6] for path in (tmp_path / "images" / "train").iterdir()] == ["inputs"]

    def test_training_is_unchanged(self, line, numbers, tmp_path):
        torch.manual_seed(1)
        start = {key: value.clone() for key, value in line.state_dict().items()}
        fit_line(line, numbers, tmp_path, [])
        without = line.line.weight.detach().clone()
        line.load_state_dict(start)
        torch.manual_seed(1)
        fit_line(line, numbers, tmp_path, [ImageLogger(batch_frequency=1, max_images=2)])
        assert line.previews == 4
        assert torch.equal(line.line.weight, without)

    def test_images_in_tensorboard(self, line, numbers, tmp_path):
        seen = []
        log = pl.loggers.TensorBoardLogger(tmp_path)
        log.experiment.add_image = lambda tag, *args, **kwargs: seen.append(tag)
        fit_line(line, numbers, tmp_path, [ImageLogger(1, 2)], steps=1, logger=log)
        assert seen == ["train/slope"]


IMAGES = "lightning.callbacks.image_logger.params"


BATCH = {"image": torch.zeros(2, 32, 32, 3), "caption": ["a photo of *", "a rendering of *"]}


def test_noise_of_a_prompt_does_not_depend_on_other_prompts() -> None:
    model = Golden("clip_one_vector").model()
    options = {"ddim_steps": 1, "N": 2}
    prompts = ["a photo of *", "a cat", "two *"]
    many = model.log_images(BATCH, prompts=prompts, images_per_prompt=2, **options)
    assert many.keys() == {"inputs", "reconstruction", "conditioning", "prompts"}
    assert many["prompts"].shape == (6, 3, 32, 32)
    torch.manual_seed(99)
    again = model.log_images(BATCH, prompts=["two *"], images_per_prompt=1, **options)
    torch.testing.assert_close(again["prompts"][0], many["prompts"][4], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(many["prompts"][4], many["prompts"][5], atol=1e-2), "two noises"
    both = model.log_images(BATCH, prompts=["two *"], sample=True, **options)
    assert {"samples", "samples_scaled", "prompts"} <= both.keys()


def test_sampler_of_previews(monkeypatch) -> None:
    model, calls = Golden("clip_one_vector").model(), []

    class Spy(previews.DPMSolverSampler):
        def sample(self, S, batch_size, shape, **options):
            calls.append((S, batch_size, options["unconditional_guidance_scale"]))
            return options["x_T"], {}

    monkeypatch.setattr(previews, "DPMSolverSampler", Spy)
    model.log_images(BATCH, N=2, prompts=["a", "b", "c"])
    assert calls == [(12, 2, 5.0), (12, 1, 5.0)], "no more images at once than the previews hold"
    calls.clear()
    model.log_images(BATCH, N=4, prompts=["a"], steps=20)
    assert calls == [(20, 1, 5.0)]


def test_prompts_are_filled_with_every_placeholder() -> None:
    model = Golden("clip_one_vector").model()
    strings = ["<a>", PER_IMAGE_TOKENS[0], "<b>", "<b>-neg"]
    model.embedding_manager.take({string: torch.ones(1, 32) for string in strings}, "test")
    prompts = ["a photo of {}", "a dog"]
    assert filled_prompts(prompts, model) == ["a photo of <a>", "a photo of <b>", "a dog"]
    assert filled_prompts(prompts, nn.Identity()) == ["a photo of *", "a dog"]


def test_prompt_sheet() -> None:
    def plain(colour: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (colour, 0, 0))

    sheet = prompt_sheet([plain(10)], ["one", "two"], [plain(c) for c in (50, 100, 150, 200)])
    rows = np.asarray(sheet)[:, :, 0]
    cell = sheet.height // 3
    middle = [64 + column * (128 + 4) for column in range(2)]
    assert [[int(rows[40 + row * cell, x]) for x in middle] for row in range(3)] == [
        [10, 10],
        [50, 150],
        [100, 200],
    ]


def test_run_with_previews_learns_the_same(tiny_yaml) -> None:
    prompts = [f"{IMAGES}.prompts=['a photo of {{}}', 'two {{}}']", f"{IMAGES}.batch_frequency=2"]
    often = [*prompts, f"{IMAGES}.log_images_kwargs.ddim_steps=1", f"{IMAGES}.increase_log_steps=false"]
    assert start("--base", tiny_yaml, "-t", "-l", "shown", *often) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "blind", f"{IMAGES}.disabled=true") == 0
    (run,) = Path("shown").iterdir()
    sheets = sorted(path.name[:17] for path in (run / "images" / "train").glob("prompts_*"))
    assert sheets == ["prompts_gs-000002", "prompts_gs-000004", "prompts_gs-000006"]
    assert (run / "progress.png").is_file()
    assert not list((run / "images" / "train").glob("samples_*")), "prompts replace the captions"
    shown, blind = state_of("shown"), state_of("blind")
    (vectors,) = (v for k, v in shown["state_dict"].items() if "string_to_param" in k)
    assert torch.equal(vectors, next(v for k, v in blind["state_dict"].items() if "string_to_param" in k))
    assert torch.equal(shown["random_states"][0]["torch"], blind["random_states"][0]["torch"])


def test_loggers_with_images(tmp_path) -> None:
    logged = []
    board = SimpleNamespace(
        experiment=SimpleNamespace(add_image=lambda tag, grid, **rest: logged.append((tag, grid.shape[2])))
    )
    wandb = SimpleNamespace(log_image=lambda key, images, step: logged.append((key, step)))
    trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=[board, wandb], global_step=7)
    ImageLogger(1, 1)._save(trainer, "train", "prompts", "gs-7", Image.new("RGB", (4, 4)))
    assert logged == [("train/prompts", 3), ("train/prompts", 7)]


@pytest.mark.parametrize(
    ("params", "message"),
    [({"prompts": "a photo"}, "give a list"), ({"images_per_prompt": 0}, "images_per_prompt is 0")],
)
def test_invalid_params(params, message) -> None:
    with pytest.raises(UserError, match=message):
        ImageLogger(1, 1, **params)
