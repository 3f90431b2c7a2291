"""What all text encoders share: the call with an embedding manager, and reading from folders and the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ldm.modules.personalization import Personalization, TextEncoder
from ldm.util import UserError

logger = logging.getLogger(__name__)

# A folder of transformers holds the weights in one of these files.
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


class PromptEncoder(nn.Module, TextEncoder):
    """Base of the text encoders: prompts to token ids, and both ways to call an encoder.

    `TextEncoder` says what the members are. A subclass sets `family`, `max_length`, `prompt_tokenizer` and
    `token_embedding`, and implements `embed_ids`.

    Attributes:
        causal: whether the output at a token depends on the tokens before it only.
    """

    causal = True

    @property
    def width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def token_ids(
        self, text: str | Sequence[str], embedding_manager: Personalization | None = None
    ) -> Tensor:
        placeholders = {}
        if embedding_manager is not None:
            # The ids are scalars on the CPU, so reading them does not wait for a GPU.
            placeholders = {
                word: int(token) for word, token in embedding_manager.string_to_token_dict.items()
            }
        ids = self.prompt_tokenizer.encode(text, placeholders)
        # Non-blocking: a GPU may still be busy with the steps before.
        return ids.to(self.device, non_blocking=True)

    def forward(self, text: str | Sequence[str], embedding_manager: Personalization | None = None) -> Any:
        """Encode prompts as the condition of the denoiser, see `embed_ids`.

        The manager is called with the token ids [B, L] and the token embeddings [B, L, d] before position
        embeddings are added, and returns the token embeddings to continue with.
        """
        return self.embed_ids(self.token_ids(text, embedding_manager), embedding_manager)

    def encode(self, text: str | Sequence[str], embedding_manager: Personalization | None = None) -> Any:
        return self(text, embedding_manager=embedding_manager)

    def freeze(self) -> PromptEncoder:
        """Switch to evaluation mode and exclude every parameter from training."""
        return self.eval().requires_grad_(False)


def ignore_device(owner: str, device: Any) -> None:
    """Accept the `device` of old YAMLs without effect: a module is moved by its owner."""
    if device is not None:
        logger.debug("%s: 'device: %s' is ignored, the encoder is where its model is", owner, device)


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Turn any exception of the Hugging Face readers in this block into one UserError with a remedy.

    Progress bars appear only for downloads, not for local folders.
    """
    try:
        with _without_progress_bars() if Path(source).is_dir() else nullcontext():
            yield
    except UserError:
        raise
    except Exception as error:  # the readers raise many kinds, from OSError to SafetensorError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if Path(source).is_dir():
            raise UserError(f"{what}: a file in the folder cannot be read ({reason}); replace it") from error
        raise UserError(
            f"{what} is neither a folder here nor readable from the Hugging Face hub ({reason}); "
            "go online for the first use, or name a local folder as version or tokenizer of "
            "cond_stage_config in a YAML"
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def read_tokenizer(tokenizer_class: Any, what: str, source: str) -> Any:
    """Read a tokenizer of a transformers class from a folder or the hub.

    Raises:
        UserError: it cannot be read, or has no vocabulary (transformers 5 then makes a tokenizer of special tokens).
    """
    with reading(what, source):
        tokenizer = tokenizer_class.from_pretrained(source)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise OSError("it is not there, or there is no connection")
    return tokenizer
