"""Gives a learned word to others: a repository on the Hugging Face hub with a model card, and a pipeline of diffusers.

`check` is asked before torch is imported; everything heavy is imported inside functions.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ldm.files import is_hub_id, write_text
from ldm.util import UsageError, UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

FOLDER, PIPELINE = "hub", "pipeline"
MOST_IMAGES = 4
# Prompts of the sample images if the run has no previews of prompts.
PROMPTS = ("a photo of {}", "a painting of {}")


# -- before training -----------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Check what --push_to_hub needs: the package, the name of the repository, and a token that the hub knows.

    Raises:
        UsageError: one of them is missing or wrong.
        UserError: the hub refuses the token or cannot be reached.
    """
    if not options.push_to_hub:
        return
    try:
        import huggingface_hub as hub
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError:
        raise UsageError(
            "--push_to_hub needs a package: pip install huggingface_hub, or leave the flag out"
        ) from None
    name = repository_name(options)
    try:
        validate_repo_id(name)
    except ValueError:
        raise UsageError(
            f"'{name}' is no name of a repository; give --hub_model_id OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from None
    token = options.hub_token or hub.get_token()
    if not token:
        raise UsageError(
            "--push_to_hub needs a token of the Hugging Face hub: run 'hf auth login' once, or set HF_TOKEN"
        )
    try:
        account = hub.HfApi(token=token).whoami()
    except Exception as error:  # of many kinds: a wrong token, no connection, offline mode
        raise UserError(
            f"--push_to_hub: the hub does not accept the token or cannot be reached ({_reason(error)}); run 'hf auth "
            "login', go online, or leave the flag out and upload later with 'hf upload'"
        ) from error
    role = (account.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            "--push_to_hub: the token may only read; make one that may write, and run 'hf auth login'"
        )


def check_model(
    options: argparse.Namespace, config: DictConfig, run: RunFolder, model: pl.LightningModule
) -> None:
    """Check that what is asked for the end of the run can be made of this model.

    Raises:
        UsageError: the model learns no word that others can load.
        UserError: diffusers cannot represent the model.
    """
    from ldm.training.callbacks.base import personalization_of, shared_vectors

    asked = [flag for flag in ("push_to_hub", "save_as_full_pipeline") if getattr(options, flag)]
    if not asked:
        return
    words = list(shared_vectors(personalization_of(model)))
    if not words:
        raise UsageError(
            f"--{asked[0]} is for learned words, and this YAML learns none that other programs can load"
        )
    if options.save_as_full_pipeline:
        if not config.get("actual_resume"):
            raise UsageError("--save_as_full_pipeline needs the base model: give --actual_resume MODEL")
        from ldm.interop.diffusers_pipeline import check_supported

        try:
            check_supported(
                model, [diffusers_token(word, stem) for word, stem in run.word_stems(words).items()]
            )
        except UserError as error:
            raise UserError(f"--save_as_full_pipeline: {error}") from error


def repository_name(options: argparse.Namespace) -> str:
    """The repository that is asked for: --hub_model_id, or the name of --output_dir.

    Raises:
        UsageError: neither is given.
    """
    name = options.hub_model_id or (Path(options.logdir).name if options.logdir != "logs" else "")
    if not name:
        raise UsageError("--push_to_hub needs the name of a repository: give --hub_model_id OWNER/NAME")
    return str(name)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# -- at the end of the training ------------------------------------------------------------------------------


def save_samples(trainer: pl.Trainer, model: LatentDiffusion, prompts: Sequence[str], each: int) -> None:
    """Sample images of prompts for the model card; a failure is a warning. Training images are never uploaded."""
    if not trainer.is_global_zero:
        return
    import torch

    from ldm import random_state
    from ldm.generate.images import generate, save_image
    from ldm.training.callbacks.image_logger import filled_prompts

    texts = [text for text in filled_prompts(prompts, model) for _ in range(each)][:MOST_IMAGES]
    folder = Path(trainer.default_root_dir) / FOLDER
    try:
        with (
            random_state.isolated(0),
            model.first_stage_on(model.device),
            trainer.precision_plugin.val_step_context(),
        ):
            images = generate(model, texts, steps=25, sampler="dpm_solver")
    except (UserError, torch.OutOfMemoryError) as error:
        logger.warning("no sample images for the model card: %s", error)
        return
    for number, image in enumerate(images):
        save_image(image, folder / f"sample_{number}.png")


def _samples(folder: Path) -> dict[str, str]:
    """The prompt of each sample image in a folder, by its file name."""
    from PIL import Image

    from ldm.generate.images import PARAMETERS, Settings

    found = {}
    for path in sorted(folder.glob("sample_*.png")):
        with Image.open(path) as image:
            found[path.name] = Settings.from_text(image.info[PARAMETERS]).prompt
    return found


@dataclass(frozen=True)
class Learned:
    """The words of a finished run.

    Attributes:
        stems: the file name without suffix of each word.
        base: the base model, as the user named it.
        clip: whether the text encoder is CLIP's, whose words other programs load.
        settings: what the model card says of the training, by name.
    """

    stems: Mapping[str, str]
    base: str | None
    clip: bool
    settings: Mapping[str, Any]


def learned_of(config: DictConfig, run: RunFolder, model: pl.LightningModule) -> Learned:
    """What a finished run has learned, and how."""
    from omegaconf import OmegaConf

    from ldm import embeddings
    from ldm.training.callbacks.base import personalization_of, shared_vectors

    manager = personalization_of(model)
    counts = {} if manager is None else dict(manager.placeholders)
    words = list(shared_vectors(manager))
    stems = {
        word: stem
        for word, stem in run.word_stems(words).items()
        if (run.checkpoints / f"{stem}.safetensors").is_file()
    }
    metadata = next(
        (
            embeddings.read(run.checkpoints / f"{stem}.safetensors").metadata.known()
            for stem in stems.values()
        ),
        {},
    )
    settings = {
        "vectors": ", ".join(str(counts[word]) for word in stems),
        "initializer": metadata.get("initializer"),
        "base model": metadata.get("base_model"),
        "images": metadata.get("images"),
        "resolution": metadata.get("resolution"),
        "steps": metadata.get("steps"),
        "batch size": OmegaConf.select(config, "data.params.batch_size"),
        "gradient accumulation": OmegaConf.select(config, "lightning.trainer.accumulate_grad_batches"),
        "learning rate": metadata.get("learning_rate"),
        "schedule": OmegaConf.select(config, "model.params.scheduler_config.params.name")
        or OmegaConf.select(config, "model.params.scheduler_config.target"),
        "precision": OmegaConf.select(config, "lightning.trainer.precision"),
        "seed": metadata.get("seed"),
    }
    base = config.get("actual_resume")
    return Learned(
        stems,
        None if base is None else str(base),
        getattr(getattr(model, "cond_stage_model", None), "family", "") == "clip",
        {name: value for name, value in settings.items() if value not in (None, "")},
    )


def diffusers_token(word: str, stem: str) -> str:
    """The word in diffusers, which refuses words that are in its vocabulary, as "*" and every common word."""
    return word if word.startswith("<") and word.endswith(">") else f"<{stem}>"


def prepare(run: RunFolder, learned: Learned) -> Path:
    """Write the folder that is uploaded, without its card: the files of each word, and the sample images.

    A single word is also saved under the name that diffusers looks for.
    """
    import shutil

    from ldm import embeddings

    folder = run.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stem in learned.stems.values():
        shutil.copyfile(run.checkpoints / f"{stem}.safetensors", folder / f"{stem}.safetensors")
    if len(learned.stems) == 1 and learned.clip:
        ((word, stem),) = learned.stems.items()
        read = embeddings.read(run.checkpoints / f"{stem}.safetensors")
        read = (
            read.renamed({word: diffusers_token(word, stem)}) if word != diffusers_token(word, stem) else read
        )
        embeddings.write(read, folder / "learned_embeds.safetensors", "diffusers")
    return folder


def card(
    repository: str, learned: Learned, samples: Mapping[str, str], license: Mapping[str, str] | None = None
) -> str:
    """The model card: README.md with a YAML front matter, the samples, how to load the word, and the settings.

    Args:
        samples: the prompt of each sample image, by its file name.
        license: what the card of the repository says of its license, which stays.
    """
    base = learned.base if learned.base and is_hub_id(learned.base) else None
    front: dict[str, Any] = {**(license or {}), **({"base_model": base} if base else {})}
    front["tags"] = ["textual_inversion", "text-to-image", *(["diffusers"] if learned.clip else [])]
    words = list(learned.stems)
    shown = learned.settings.get("base model") or "a latent diffusion model"
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]
    lines += [f"# {', '.join(map(_code, words))}", ""]
    lines += [
        f"{'A word' if len(words) == 1 else 'Words'} learned by textual inversion for {_code(base or str(shown))}: "
        "only the vectors of the text encoder's new word are trained.",
        "",
    ]
    for file, prompt in samples.items():
        lines += [f"![{file}]({file})", "", _code(prompt), ""]
    lines += ["## Use", "", *_loading(repository, learned, base), "## Training", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_code(_figure(value))} |" for name, value in learned.settings.items()]
    if not license:
        lines += ["", "The card names no license: add `license:` at its top, as the base model's allows."]
    lines += [""]
    return "\n".join(lines)


def _loading(repository: str, learned: Learned, base: str | None) -> list[str]:
    if not learned.clip:
        word, stem = next(iter(learned.stems.items()))
        command = ["python", "scripts/txt2img.py", "--embedding_path", f"{stem}.safetensors", "--prompt"]
        return ["```bash", shlex.join([*command, f"a photo of {word}"]), "```", ""]
    lines = [
        "diffusers:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base or 'THE BASE MODEL')})",
    ]
    tokens = {word: diffusers_token(word, stem) for word, stem in learned.stems.items()}
    for word, stem in learned.stems.items():
        file, token = json.dumps(f"{stem}.safetensors"), json.dumps(tokens[word], ensure_ascii=False)
        lines.append(
            f"pipe.load_textual_inversion({json.dumps(repository)}, weight_name={file}, token={token})"
        )
    first = next(iter(tokens.values()))
    lines += [f"image = pipe({json.dumps(f'a photo of {first}', ensure_ascii=False)}).images[0]", "```", ""]
    for stem in learned.stems.values():
        file = _code(f"{stem}.safetensors")
        lines += [
            f"AUTOMATIC1111: put {file} into `embeddings/`, then write {_code(f'a photo of {stem}')}.",
            "",
            f"ComfyUI: put {file} into `models/embeddings/`, then write {_code(f'a photo of embedding:{stem}')}.",
            "",
        ]
    return lines


def _figure(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    """A text as code in Markdown, so that <my-cat> is no tag and | ends no cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _license(api: Any, repository: str) -> dict[str, str]:
    """What the card of a repository says of its license, which its owner may have added."""
    data = api.model_info(repository).card_data
    known = {} if data is None else data.to_dict()
    return {key: str(known[key]) for key in ("license", "license_name", "license_link") if known.get(key)}


def upload(
    options: argparse.Namespace, config: DictConfig, run: RunFolder, model: pl.LightningModule
) -> bool:
    """Write the folder with the model card and upload it; a failure is a warning that says how to upload it later.

    Returns:
        whether it was uploaded.
    """
    name = repository_name(options)
    folder = run.path / FOLDER
    full = name
    try:
        learned = learned_of(config, run, model)
        if not learned.stems:
            raise UserError("the run has no file of a word")
        prepare(run, learned)
        samples = _samples(folder)
        write_text(folder / "README.md", card(name, learned, samples))
        import huggingface_hub as hub

        api = hub.HfApi(token=options.hub_token)
        full = api.create_repo(name, exist_ok=True).repo_id
        write_text(folder / "README.md", card(full, learned, samples, _license(api, full)))
        api.upload_folder(repo_id=full, folder_path=folder, commit_message="Textual inversion")
        if options.save_as_full_pipeline and (pipeline := newest_pipeline(run)) is not None:
            api.upload_folder(repo_id=full, folder_path=pipeline, commit_message="The pipeline with the word")
    except Exception as error:  # of many kinds, and the run itself is complete
        later = shlex.join(["hf", "upload", full, str(folder), "."])
        logger.warning(
            "not uploaded to '%s' (%s); nothing is lost, upload later: %s", full, _reason(error), later
        )
        return False
    logger.info("uploaded to the Hugging Face hub: %s", full)
    return True


def write_pipeline(config: DictConfig, run: RunFolder) -> Path:
    """Write the base model with the learned words as a pipeline of diffusers into the run folder.

    The model is read again, in float32: frozen weights may have been in half precision while training.

    Raises:
        UserError: diffusers cannot represent the model, or the folder cannot be written.
    """
    import os

    from transformers.utils import logging as transformers_logging

    # Both libraries warn about image processors and new token embeddings, which do not matter here.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    transformers_logging.set_verbosity_error()

    from ldm.base_models import complete_config
    from ldm.checkpoint import load_model_from_config
    from ldm.generate.embeddings import load_embeddings, personalization_of
    from ldm.interop import diffusers_pipeline

    source = config["actual_resume"]
    which = {"variant": config.get("variant"), "revision": config.get("revision")}
    node, _ = complete_config(config["model"], source, **which)
    model: Any = load_model_from_config(node, source, "cpu", vae=config.get("vae"), **which)
    words = load_embeddings(model, [run.embeddings])
    vectors = personalization_of(model).export()
    stems = run.word_stems(words)
    names = {word: diffusers_token(word, stems[word]) for word in words if word in vectors}
    pipeline = diffusers_pipeline.to_pipeline(model, {"model": node})
    diffusers_pipeline.add_words(pipeline, {new: vectors[old] for old, new in names.items()})
    diffusers_pipeline.compare_with_model(model, pipeline, names)
    number, folder = 1, run.path / PIPELINE
    while folder.exists():
        number += 1
        folder = run.path / f"{PIPELINE}-{number}"
    return diffusers_pipeline.save_pipeline(pipeline, folder)


def newest_pipeline(run: RunFolder) -> Path | None:
    """The pipeline that the run wrote last; None if there is none."""
    found = sorted(run.path.glob(f"{PIPELINE}*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None
