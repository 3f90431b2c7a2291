"""A folder of diffusers read here computes what its pipeline computes, and what is written here is read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.base_models import complete_config, recognise
from ldm.checkpoint import load_model_from_config, save_state_dict
from ldm.commands import generate as generate_command
from ldm.generate.images import generate
from ldm.models.diffusion.conditioning import context_of
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sdxl import SizedCaptions

pytest.importorskip("diffusers")

from ldm.interop import diffusers_pipeline  # noqa: E402
from tests.pipelines import make_pipeline  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# Family and what the denoiser predicts -> the YAML that is found for it.
CASES = {
    ("sd1", "epsilon"): "v1-finetune.yaml",
    ("sd1", "v_prediction"): "v1-finetune.yaml",
    ("sd2", "epsilon"): "v2-finetune.yaml",
    ("sd2", "v_prediction"): "v2-finetune_v.yaml",
    ("sdxl", "epsilon"): "xl-finetune.yaml",
}
# Whole commands are run with one of each family.
COMMANDS = pytest.mark.parametrize(
    "case", [("sd1", "v_prediction"), ("sd2", "v_prediction"), ("sdxl", "epsilon")], ids=str, indirect=True
)
SIZES = (16, 16, 0, 0, 16, 16)
PROMPTS = ["a photo of a dog, on the beach", "a painting"]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tmp_path_factory):
    """(pipeline, the model read from its folder, the folder)"""
    root = tmp_path_factory.mktemp("case")
    # The rarer things that folders hold are in one of the cases.
    options = {"zero_snr": request.param == ("sd1", "v_prediction")}
    options |= {"words": ("<learned>", "<learned>_1")} if request.param[0] == "sdxl" else {}
    pipeline = make_pipeline(request.param[0], root / "tokenizers", request.param[1], **options)
    pipeline.save_pretrained(root / "pipeline")
    base = recognise(root / "pipeline")
    assert base.family == request.param[0] and base.finetune_config.name == CASES[request.param]
    model = load_model_from_config(base.finetune_config, root / "pipeline")
    return pipeline, model, root / "pipeline"


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), (ours - theirs).abs().max()


@torch.no_grad()
def test_every_part_computes_the_same(case) -> None:
    pipeline, model, _ = case
    theirs, _, *pooled = pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    condition = model.get_learned_conditioning(PROMPTS)
    close(context_of(condition), theirs)
    added = None
    if pooled:
        close(condition["c_adm"][0][:, :64], pooled[0])
        added = {"text_embeds": pooled[0], "time_ids": torch.tensor([SIZES] * 2)}
    generator = torch.Generator().manual_seed(0)
    latent, time = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    expected = pipeline.unet(latent, time, theirs, added_cond_kwargs=added).sample
    close(model.apply_model(latent, time, condition), expected)
    image = torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1
    posterior = pipeline.vae.encode(image).latent_dist
    ours = model.encode_first_stage(image)
    close(ours.mean, posterior.mean)
    close(ours.logvar, posterior.logvar)
    scaled = latent / pipeline.vae.config.scaling_factor
    close(model.decode_first_stage(latent), pipeline.vae.decode(scaled).sample)
    close(model.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_loss_and_gradient_of_the_vectors_are_the_same(case) -> None:
    pipeline, model, folder = case
    encoder = model.cond_stage_model
    word, vector = "<cat>", torch.randn(1, encoder.width, generator=torch.Generator().manual_seed(5)) * 0.05
    model.embedding_manager.take({word: vector}, "the test")
    generator = torch.Generator().manual_seed(1)
    latent, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    time = torch.tensor([100, 800])
    prompts = [f"a photo of {word}", f"a painting of a {word}, on the beach"]
    sizes = torch.tensor([[40, 20, 0, 8, 16, 16], [300, 300, 5, 0, 16, 16]])
    is_xl = encoder.family == "sdxl"
    captions = SizedCaptions(prompts, sizes) if is_xl else prompts
    loss, _ = model.p_losses(latent, model.get_learned_conditioning(captions), time, noise=noise)
    (parameter,) = model.embedding_manager.embedding_parameters()
    (gradient,) = torch.autograd.grad(loss, parameter)

    theirs = type(pipeline).from_pretrained(folder)
    tables, states, added = [], [], None
    for end, part in zip(diffusers_pipeline.ENDS, vector.split(encoder.widths, dim=1), strict=False):
        tokenizer, tower = getattr(theirs, f"tokenizer{end}"), getattr(theirs, f"text_encoder{end}")
        tokenizer.add_tokens(word)
        tower.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables.append(tower.get_input_embeddings().weight)
        with torch.no_grad():
            tables[-1][-1] = part[0]
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = tower(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2] if is_xl else output[0])
        if end:
            added = {"text_embeds": output[0], "time_ids": sizes}
    noisy = pipeline.scheduler.add_noise(latent, noise, time)
    target = noise
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        target = pipeline.scheduler.get_velocity(latent, noise, time)
    output = pipeline.unet(noisy, time, torch.cat(states, dim=-1), added_cond_kwargs=added).sample
    their_loss = F.mse_loss(output, target)
    their_gradient = torch.cat([grad[-1] for grad in torch.autograd.grad(their_loss, tables)])
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert all(part.abs().max() > 0 for part in gradient[0].split(encoder.widths))
    close(gradient[0], their_gradient, 2e-3)
    model.embedding_manager.take({}, "the test")


@torch.no_grad()
def same_image(model: Any, pipeline: Any, steps: int = 10, scale: float = 3.0) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents, _ = DDIMSampler(model).sample(
        steps,
        1,
        (4, 8, 8),
        conditioning=model.get_learned_conditioning(PROMPTS[:1]),
        x_T=noise,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=model.get_unconditional_conditioning([""]),
    )
    options = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise}
    close(latents, pipeline(PROMPTS[0], **options, output_type="latent").images, 2e-3)
    (image,) = generate(model, PROMPTS[:1], steps=steps, scale=scale, x_T=noise)
    (theirs,) = pipeline(PROMPTS[0], **options).images
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1
    assert np.asarray(image).std() > 2


def test_the_same_noise_gives_the_same_image(case) -> None:
    pipeline, model, _ = case
    same_image(model, pipeline)


def test_an_exported_folder_and_a_single_file_are_read_by_diffusers(case, tmp_path) -> None:
    pipeline, model, folder = case
    config, _ = complete_config(recognise(folder).inference_config, folder)
    exported = diffusers_pipeline.to_pipeline(model, config)
    diffusers_pipeline.compare_with_model(model, exported)
    written = diffusers_pipeline.save_pipeline(exported, tmp_path / "exported")
    again = type(pipeline).from_pretrained(written, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    same_image(model, again)
    parts = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    for part in parts:
        ours, theirs = getattr(again, part).state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    state = {k: v for k, v in model.state_dict().items() if not k.startswith("embedding_manager.")}
    file = save_state_dict(state, tmp_path / "model.safetensors")
    single = type(pipeline).from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in parts:
        ours, theirs = getattr(single, part).state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part


@COMMANDS
def test_a_folder_draws_without_a_yaml(case, tmp_path, monkeypatch, capsys) -> None:
    """The command line finds the YAML, and nothing is fetched: the hub may not be asked."""
    import huggingface_hub
    from transformers.utils import hub as transformers_hub

    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(transformers_hub, "hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)
    _, _, folder = case
    words = ["--ckpt_path", str(folder), "--prompt", "a photo", "--ddim_steps", "2", "--n_samples", "1"]
    assert generate_command.main([*words, "--H", "16", "--W", "16", "--vae", str(folder / "vae")]) == 0
    assert "samples/0000.png" in capsys.readouterr().out


@COMMANDS
def test_a_word_is_trained_on_a_folder_and_drawn(case, tmp_path, monkeypatch, capsys) -> None:
    import main

    _, _, folder = case
    monkeypatch.chdir(tmp_path)
    yaml = recognise(folder).finetune_config
    words = ["--base", str(yaml), "-t", "--pretrained_model_name_or_path", str(folder), "--vae", str(folder)]
    words += [
        "--data_root",
        str(ROOT / "data" / "concepts" / "bobo"),
        "--init_word",
        "dog",
        "--max_steps",
        "2",
    ]
    words += ["--resolution", "16", "--mixed_precision", "bf16", "data.params.train.params.repeats=1"]
    assert main.main([*words, "data.params.num_workers=0", "--accelerator", "cpu"]) == 0
    (embeddings,) = tmp_path.glob("logs/*/checkpoints/embeddings.pt")
    config = next(tmp_path.glob("logs/*/configs/*-project.yaml"))
    words = ["--ckpt_path", str(folder), "--embedding_path", str(embeddings), "--config", str(config)]
    words += ["--prompt", "a photo of *", "--ddim_steps", "2", "--n_samples", "1", "--H", "16", "--W", "16"]
    assert generate_command.main(words) == 0
    assert "samples/0000.png" in capsys.readouterr().out
