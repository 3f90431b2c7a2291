"""That a run learns: a loss that goes down and vectors that move, on pictures that can be memorised."""

from __future__ import annotations

from pathlib import Path

import torch

import main
from ldm.checkpoint import load_model_from_config
from ldm.embeddings import read
from ldm.images import list_images, open_image, to_tensor
from tests.golden_record import Golden

DRAWS = 64


@torch.no_grad()
def loss(model, picture: torch.Tensor) -> float:
    """The mean loss of a picture [3, H, W] at fixed timesteps with fixed noise, under the vectors the model holds."""
    latent = model.get_first_stage_encoding(model.encode_first_stage(picture[None]).mode())
    latents = latent.expand(DRAWS, -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, model.num_timesteps - 1, DRAWS).long()
    condition = model.get_learned_conditioning(["a photo of a *"] * DRAWS)
    return model.p_losses(latents, condition, t, noise)[0].item()


def test_a_loss_that_goes_down_and_vectors_that_move(tiny_yaml, tiny_model, pictures) -> None:
    words = ["--max_steps", "40", "--train_batch_size", "8", "data.params.train.params.flip_p=0"]
    assert main.main(["--base", str(tiny_yaml), "-t", *words, "lightning.trainer.limit_val_batches=0"]) == 0
    (run,) = Path("logs").iterdir()
    (learned,) = read(run / "checkpoints" / "embeddings.pt").concepts
    model = load_model_from_config(Golden("clip_one_vector").config(), tiny_model)
    shown = [to_tensor(open_image(path)) for path in list_images(pictures)]
    begun, before = model.embedding_manager.export()["*"], [loss(model, picture) for picture in shown]
    model.embedding_manager.take({"*": learned.vectors}, "the run")
    after = [loss(model, picture) for picture in shown]
    assert (learned.vectors - begun).norm() > begun.norm()
    assert all(a < b - 2e-3 for b, a in zip(before, after, strict=True)), (before, after)
