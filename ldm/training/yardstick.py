"""A loss that changes only when the model does: pictures, noise, timesteps and captions are fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import default_collate

from ldm.training import rng

SEED = 2302


class Yardstick:
    """The loss of `samples` fixed samples of a dataset under fixed noise, at timesteps from evenly spaced ranges.

    The samples are spread over the pictures. They go through the model `chunk` at a time, so that measuring takes
    no more memory than training. The training loss of a step says little, for its timesteps and noise decide on it
    (DVAR: Voronov et al. 2023, arXiv 2302.04841, fix them as is done here).
    """

    def __init__(self, model: Any, dataset: Any, samples: int, chunk: int) -> None:
        pictures = min(getattr(dataset, "num_images", len(dataset)), len(dataset))
        spread = [i if samples >= pictures else i * pictures // samples for i in range(samples)]
        with rng.isolated(SEED), torch.no_grad():
            items = [dataset[index % len(dataset)] for index in spread]
            batches = [default_collate(items[i : i + chunk]) for i in range(0, samples, chunk)]
            inputs = [model.get_input(_on(batch, model.device), model.first_stage_key) for batch in batches]
            self.samples = samples
            self.latents, self.captions = zip(*inputs, strict=True)
            # On the CPU, so that every device measures the same.
            self.noise = [torch.randn(latent.shape).to(latent.device) for latent in self.latents]
            places = (torch.randperm(samples) + torch.rand(samples)) / samples
        self.timesteps = (places * model.num_timesteps).long().to(model.device).split(chunk)

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """The mean loss; the model should be in evaluation mode. Draws from no generator."""
        total = torch.zeros((), device=model.device)
        chunks = zip(self.latents, self.captions, self.timesteps, self.noise, strict=True)
        with rng.isolated(SEED):
            for latents, captions, timesteps, noise in chunks:
                condition = model.get_learned_conditioning(captions)
                loss, _ = model.p_losses(latents, condition, timesteps, noise=noise)
                total += loss * len(latents)
        return float(total / self.samples)


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
