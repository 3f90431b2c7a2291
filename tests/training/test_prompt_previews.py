"""Fixed prompts under fixed noises: on disk, in the loggers, and unnoticed by the training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import main
from ldm.models.diffusion import previews
from ldm.training.callbacks.image_logger import SMALLEST, ImageLogger, filled_prompts, prompt_sheet
from ldm.util import UserError
from tests.golden_record import Golden

IMAGES = "lightning.callbacks.image_logger.params"
BATCH = {"image": torch.zeros(2, 32, 32, 3), "caption": ["a photo of *", "a rendering of *"]}


def start(*words: object) -> int:
    return main.main([str(word) for word in words])


def state(folder: str) -> dict:
    (run,) = Path(folder).iterdir()
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_prompts_noise_is_its_own_whatever_stands_beside_it() -> None:
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


def test_twenty_steps_of_the_multistep_solver(monkeypatch) -> None:
    model, made = Golden("clip_one_vector").model(), []

    class Spy(previews.DPMSolverSampler):
        def sample(self, S, batch_size, shape, **options):
            made.append((S, batch_size, options["unconditional_guidance_scale"]))
            return options["x_T"], {}

    monkeypatch.setattr(previews, "DPMSolverSampler", Spy)
    model.log_images(BATCH, N=2, prompts=["a", "b", "c"])
    assert made == [(20, 2, 5.0), (20, 1, 5.0)], "no more pictures at once than the previews hold"


def test_prompts_name_every_placeholder() -> None:
    model = Golden("clip_one_vector").model()
    model.embedding_manager.take({"<a>": torch.ones(1, 32), "<b>": torch.ones(1, 32)}, "test")
    prompts = ["a photo of {}", "a dog"]
    assert filled_prompts(prompts, model) == ["a photo of <a>", "a photo of <b>", "a dog"]
    assert filled_prompts(prompts, nn.Identity()) == ["a photo of *", "a dog"]


def test_the_sheet_has_a_row_for_each_prompt_beside_an_input() -> None:
    def plain(colour: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (colour, 0, 0))

    sheet = prompt_sheet([plain(10)], ["one", "two"], [plain(c) for c in (50, 100, 150, 200)])
    rows = np.asarray(sheet)[:, :, 0]
    cell = sheet.height // 2
    middle = [SMALLEST // 2 + column * (SMALLEST + 4) for column in range(3)]
    assert [int(rows[40, x]) for x in middle] == [10, 50, 100]
    assert [int(rows[cell + 40, x]) for x in middle] == [10, 150, 200]


def test_the_vectors_are_those_of_a_run_without_previews(tiny_yaml) -> None:
    prompts = [f"{IMAGES}.prompts=['a photo of {{}}', 'two {{}}']", f"{IMAGES}.batch_frequency=2"]
    often = [*prompts, f"{IMAGES}.log_images_kwargs.ddim_steps=1", f"{IMAGES}.increase_log_steps=false"]
    assert start("--base", tiny_yaml, "-t", "-l", "shown", *often) == 0
    assert start("--base", tiny_yaml, "-t", "-l", "blind", f"{IMAGES}.disabled=true") == 0
    (run,) = Path("shown").iterdir()
    sheets = sorted(path.name[:17] for path in (run / "images" / "train").glob("prompts_*"))
    assert sheets == ["prompts_gs-000002", "prompts_gs-000004", "prompts_gs-000006"]
    assert (run / "progress.png").is_file()
    assert not list((run / "images" / "train").glob("samples_*")), "in place of what the batch says"
    shown, blind = state("shown"), state("blind")
    (vectors,) = (v for k, v in shown["state_dict"].items() if "string_to_param" in k)
    assert torch.equal(vectors, next(v for k, v in blind["state_dict"].items() if "string_to_param" in k))
    assert torch.equal(shown["random_states"][0]["torch"], blind["random_states"][0]["torch"])


def test_loggers_that_take_pictures_get_them(tmp_path) -> None:
    got = []
    board = SimpleNamespace(
        experiment=SimpleNamespace(add_image=lambda tag, grid, **rest: got.append((tag, grid.shape[2])))
    )
    wandb = SimpleNamespace(log_image=lambda key, images, step: got.append((key, step)))
    trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=[board, wandb], global_step=7)
    ImageLogger(1, 1)._save(trainer, "train", "prompts", "gs-7", Image.new("RGB", (4, 4)))
    assert got == [("train/prompts", 3), ("train/prompts", 7)]


@pytest.mark.parametrize(
    ("params", "said"),
    [({"prompts": "a photo"}, "give a list"), ({"images_per_prompt": 0}, "images_per_prompt is 0")],
)
def test_bad_params(params, said) -> None:
    with pytest.raises(UserError, match=said):
        ImageLogger(1, 1, **params)
