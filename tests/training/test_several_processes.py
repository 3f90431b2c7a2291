"""Two processes learn what one does with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main

ROOT = Path(main.__file__).parent

# Noise and timestep follow from the caption, and posteriors have no noise: the same in whatever process.
FIXED = """
import zlib
import torch
from ldm.models.diffusion.ddpm import LatentDiffusion

class Fixed(LatentDiffusion):
    def get_first_stage_encoding(self, encoded):
        return self.scale_factor * encoded.mode()

    def forward(self, x, cond=None):
        drawn = [torch.Generator().manual_seed(zlib.crc32(caption.encode())) for caption in cond]
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in drawn])
        t = torch.cat([torch.randint(0, self.num_timesteps, (1,), generator=g) for g in drawn])
        return self.p_losses(x, self.get_learned_conditioning(cond), t, noise=noise)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo between processes")
def test_two_processes_over_gloo(tiny_yaml) -> None:
    Path("fixed.py").write_text(FIXED)
    words = ["--base", str(tiny_yaml), "-t", "--max_steps", "3", "model.target=fixed.Fixed"]
    words += ["data.params.train.params.repeats=4", "lightning.callbacks.deterministic_loss=null"]
    words += [
        "lightning.callbacks.progress=null",
        "lightning.trainer.limit_val_batches=0",
        "--accelerator",
        "cpu",
    ]

    def learned(folder: str, *more: str) -> tuple[torch.Tensor, float]:
        command = [sys.executable, str(ROOT / "main.py"), *words, "-l", folder, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        (run,) = Path(folder).iterdir()
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 3
        (vectors,) = (v for k, v in state["state_dict"].items() if "string_to_param" in k)
        return vectors, state["optimizer_states"][0]["param_groups"][0]["lr"]

    one, rate = learned("one", "data.params.batch_size=4")
    two, same = learned("two", "data.params.batch_size=2", "--devices", "2")
    assert rate == pytest.approx(same)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    half, _ = learned(
        "half", "data.params.batch_size=2", "--scale_lr", "false", f"model.base_learning_rate={rate}"
    )
    assert not torch.allclose(half, one, rtol=1e-4, atol=1e-5), "the second half of the batch counts"
