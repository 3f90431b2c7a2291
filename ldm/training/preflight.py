"""What is looked at before the first step, so that a run does not train for hours on nothing."""

from __future__ import annotations

import logging
from typing import Any

from ldm import random_state
from ldm.util import UserError

logger = logging.getLogger(__name__)

# Captions drawn from a dataset that cannot list them.
SAMPLES = 32


def check_captions(model: Any, dataset: Any) -> None:
    """Every placeholder that is learned must occur in the captions, and fit into the text encoder whole.

    Raises UserError with the caption and the remedy; captions without any placeholder are told in one line.
    """
    manager = getattr(model, "embedding_manager", None)
    if manager is None:
        return
    captions = captions_of(dataset)
    encoder = getattr(model, "cond_stage_model", None)
    tokenizer = getattr(encoder, "prompt_tokenizer", None)
    ids = {word: int(token) for word, token in manager.string_to_token_dict.items()}
    if not captions or not ids:
        return
    widths = getattr(manager, "placeholders", {})
    full = {
        word: len(manager.vectors(word)) if hasattr(manager, "vectors") else widths.get(word, 1)
        for word in ids
    }
    without = [caption for caption in captions if not _found(caption, ids, tokenizer)]
    if len(without) == len(captions):
        words = ", ".join(f"'{word}'" for word in list(ids)[:3])
        raise UserError(
            f"none of the captions holds the placeholder {words} (one is '{captions[0]}'); set placeholder_token of "
            "the dataset, or --placeholder_string, to the same word"
        )
    if without:
        logger.warning(
            "%d of %d captions hold no placeholder and teach nothing, such as '%s'",
            len(without),
            len(captions),
            without[0],
        )
    if len(captions) == 1:
        logger.warning("all captions are '%s': the vectors will learn that sentence too", captions[0])
    if tokenizer is None:
        return
    for caption in captions:
        cut = tokenizer.truncated(caption, ids, full)
        if cut:
            raise UserError(
                f"the token limit of {tokenizer.max_length} cuts off the placeholder '{cut[0].placeholder}' in the "
                f"caption '{caption[:120]}'; shorten the caption or use fewer vectors"
            )


def check_progress(model: Any, max_steps: int | None) -> None:
    """Say so if a run ends before its second progressive vector joins."""
    manager = getattr(model, "embedding_manager", None)
    scale = getattr(manager, "progressive_scale", 0)
    if getattr(manager, "progressive_step", None) is not None and 0 < (max_steps or 0) <= scale:
        logger.warning(
            "progressive_words adds a vector every %d steps and the run ends after %d: only the first is learned; "
            "set personalization_config.params.progressive_scale lower or max_steps higher",
            scale,
            max_steps,
        )


def captions_of(dataset: Any) -> list[str]:
    """All captions of a dataset, or those of some samples where it cannot list them."""
    if hasattr(dataset, "captions"):
        return list(dataset.captions())
    if not hasattr(dataset, "__len__"):
        return []
    with random_state.isolated(0):
        samples = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
    found = [sample.get("caption") for sample in samples if isinstance(sample, dict)]
    return list(dict.fromkeys(caption for caption in found if isinstance(caption, str)))


def _found(caption: str, ids: dict[str, int], tokenizer: Any) -> bool:
    if tokenizer is None:
        return any(word in caption for word in ids)
    # No limit here: a placeholder beyond it is found, and reported as cut off.
    content = tokenizer.truncated(caption, ids, dict.fromkeys(ids, 10**6))
    return bool(content)


def banner(
    *,
    model: Any,
    datasets: dict[str, Any],
    device: str,
    steps: int | None,
    batch_size: int,
    rate: str,
    folder: Any,
) -> list[str]:
    """The lines that say what is about to be trained on what."""
    lines = []
    manager = getattr(model, "embedding_manager", None)
    if manager is not None:
        counts = {word: str(count) for word, count in getattr(manager, "placeholders", {}).items()}
        words = ", ".join(
            f"'{word}' ({count} vector{'s' * (count != '1')})" for word, count in list(counts.items())[:6]
        )
        lines.append(f"learning {words or 'new words'} from {_images(datasets.get('train'))}")
    else:
        lines.append(f"training {type(model).__name__} on {_images(datasets.get('train'))}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines.append(f"{trainable:,} of {total:,} parameters are trained, on {device}")
    lines.append(f"{f'{steps} steps' if steps else 'no end set'} of batch {batch_size}; {rate}")
    lines.append(f"run folder: {folder}")
    return lines


def _images(dataset: Any) -> str:
    count = getattr(dataset, "num_images", None)
    if count is not None:
        return f"{count} image{'s' * (count != 1)}"
    return f"{len(dataset)} samples" if hasattr(dataset, "__len__") else "a stream of samples"
