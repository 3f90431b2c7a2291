"""Checks before the first step, so that a run does not train for hours on nothing, and the summary of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm import embeddings, random_state
from ldm.data.captions import absent_key, no_placeholder
from ldm.embeddings.reader import chosen
from ldm.generate.request import check_encoder
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.personalization import Personalization, TextEncoder
from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.prompts import PER_IMAGE_TOKENS
from ldm.training.callbacks.base import personalization_of
from ldm.util import UserError, get_obj_from_str, raise_problems
from ldm.words import own_words

logger = logging.getLogger(__name__)

# The number of samples read from a dataset that cannot list its captions.
SAMPLES = 32


def check_first_vectors(config: DictConfig) -> None:
    """Check that a run can begin from its embedding file, before a model is read: its words and the text encoder.

    Raises:
        UserError: it is not, or does not.
    """
    node = OmegaConf.select(config, "model.params.personalization_config") or {}
    params = node.get("params") or {}
    if path := params.get("embedding_manager_ckpt"):
        words = params.get("placeholder_strings") or []
        kind: type[Personalization] = get_obj_from_str(node["target"])
        strings = [words] if isinstance(words, str) else list(words)
        kind.check_file(path, strings)
        base = config.get("actual_resume")
        # A folder of diffusers, or a hub id, replaces the width of the YAML by its own.
        if issubclass(kind, EmbeddingManager) and (base is None or Path(base).is_file()):
            check_encoder(config, [chosen(embeddings.read(path), strings, str(path))])


def check_keys(config: DictConfig, dataset: Any) -> None:
    """Check that samples have the images and captions under the keys by which the model reads them.

    Raises:
        UserError: they do not.
    """
    params = OmegaConf.select(config, "model.params") or {}
    if not hasattr(dataset, "__len__"):
        return
    with random_state.isolated(0):
        sample = dataset[0]
    for name in ("first_stage_key", "cond_stage_key"):
        key = params.get(name)
        if isinstance(sample, dict) and key is not None and key not in sample:
            raise_problems([absent_key(name, key, sample)])


def check_captions(model: pl.LightningModule, dataset: Any) -> None:
    """Check that the captions contain the learned placeholders, and that these fit into the token limit.

    Captions without a placeholder are one warning.

    Raises:
        UserError: no caption contains any placeholder or one of the dataset's, or a caption is too long for them.
    """
    manager = personalization_of(model)
    if manager is None or not manager.string_to_token_dict:
        return
    captions = captions_of(dataset)
    if not captions:
        return
    tokenizer = cast(TextEncoder, model.cond_stage_model).prompt_tokenizer
    ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
    without = [caption for caption in captions if not tokenizer.found([caption], ids)]
    if len(without) == len(captions):
        raise no_placeholder(list(ids), captions[0])
    found = tokenizer.found(captions, ids)
    for word in getattr(dataset, "placeholders", ()):
        if word in ids and word not in found:
            raise UserError(
                f"none of the captions contains the placeholder '{word}' (one caption is '{captions[0]}'); write "
                "{} or [name] in the templates, or the word in the captions"
            )
    # A negative is in no caption, and there are more words for single images than images.
    if unseen := [word for word in own_words(ids) if word not in {*found, *PER_IMAGE_TOKENS}]:
        text = "no caption contains %s: nothing is learned for %s; give images of each word in data_root"
        logger.warning(
            text, ", ".join(f"'{word}'" for word in unseen[:3]), "it" if len(unseen) == 1 else "them"
        )
    if without:
        logger.warning(
            "%d of %d captions contain no placeholder and train nothing, such as '%s'",
            len(without),
            len(captions),
            without[0],
        )
    if len(captions) == 1:
        logger.warning("all captions are '%s': the vectors will learn that sentence too", captions[0])
    check_token_limit(captions, tokenizer, ids, manager.most_positions())


def check_token_limit(
    captions: list[str], tokenizer: PromptTokenizer, ids: Mapping[str, int], positions: Mapping[str, int]
) -> None:
    """Check captions against the token limit; other text beyond it is one warning.

    Raises:
        UserError: a placeholder with its `positions` exceeds the limit.
    """
    lost = []
    for caption in captions:
        if cut := tokenizer.truncated(caption, ids, positions):
            raise UserError(
                f"the token limit of {tokenizer.max_length} cuts off the placeholder '{cut[0].placeholder}' in the "
                f"caption '{caption[:120]}'; shorten the caption or use fewer vectors"
            )
        if beyond := tokenizer.overflow(caption, ids, positions):
            lost.append(beyond)
    if lost:
        logger.warning(
            "%d of %d captions are longer than the token limit of %d: '%s' and what follows it has no effect",
            len(lost),
            len(captions),
            tokenizer.max_length,
            lost[0][:80],
        )


def check_progress(model: pl.LightningModule, max_steps: int | None) -> None:
    """Warn if a run ends before progressive_words adds the second vector."""
    manager = personalization_of(model)
    # How vectors are added is a matter of this class, not of the Personalization protocol.
    if not isinstance(manager, EmbeddingManager) or manager.progressive_step is None:
        return
    if 0 < (max_steps or 0) <= manager.progressive_scale:
        logger.warning(
            "progressive_words adds a vector every %d steps and the run ends after %d: only the first is learned; "
            "set personalization_config.params.progressive_scale lower or max_steps higher",
            manager.progressive_scale,
            max_steps,
        )


def captions_of(dataset: Any) -> list[str]:
    """All captions of a dataset, or those of its first samples if it cannot list them."""
    if hasattr(dataset, "captions"):
        return list(dataset.captions())
    if not hasattr(dataset, "__len__"):
        return []
    with random_state.isolated(0):
        samples = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
    captions = [sample.get("caption") for sample in samples if isinstance(sample, dict)]
    return list(dict.fromkeys(caption for caption in captions if isinstance(caption, str)))


def summary(
    *,
    model: pl.LightningModule,
    datasets: Mapping[str, Any],
    device: str,
    steps: int | None,
    batch: str,
    rate: str,
    folder: Path,
) -> list[str]:
    """The log lines that describe a run: what is trained, on which images and device, how long and where."""
    manager = personalization_of(model)
    images = _images(datasets.get("train"))
    if manager is not None:
        words = [
            f"'{word}' ({count} vector{'s' * (count != 1)})" for word, count in manager.placeholders.items()
        ]
        lines = [f"learning {', '.join(words[:6]) or 'new words'} from {images}"]
    else:
        lines = [f"training {type(model).__name__} on {images}"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines.append(f"{trainable:,} of {total:,} parameters are trained, on {device}")
    lines.append(f"{f'{steps} steps' if steps else 'no limit'} of {batch}; {rate}")
    lines.append(f"run folder: {folder}")
    return lines


def _images(dataset: Any) -> str:
    count = getattr(dataset, "num_images", None)
    if count is not None:
        return f"{count} image{'s' * (count != 1)}"
    return f"{len(dataset)} samples" if hasattr(dataset, "__len__") else "a stream of samples"
