"""The small encoders, and what all text encoders share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.tokens import PromptTokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import UserError

logger = logging.getLogger(__name__)


def ignore_device(owner: str, device: Any) -> None:
    """Accept the `device` of an old YAML: a module is where it is moved to."""
    if device is not None:
        logger.debug("%s: 'device: %s' is ignored, the encoder is where its model is", owner, device)


class TextEncoder(nn.Module):
    """What FrozenCLIPEmbedder and BERTEmbedder offer to the models, the manager and the training.

    A subclass sets `max_length`, `prompt_tokenizer` and `token_embedding`, and turns token ids [B, L] into a
    context [B, L, d] in `embed_ids`.
    """

    max_length: int
    prompt_tokenizer: PromptTokenizer

    @property
    def token_embedding(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The width d of a token embedding."""
        return self.token_embedding.embedding_dim

    def embed_ids(self, ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
        raise NotImplementedError

    def token_ids(self, text: str | Sequence[str], embedding_manager: Any = None) -> Tensor:
        """Token ids [B, L] on the encoder's device, with the manager's placeholders found in the text."""
        # These are scalars on the CPU, so reading them does not wait for a GPU.
        placeholders = {
            string: int(token)
            for string, token in getattr(embedding_manager, "string_to_token_dict", {}).items()
        }
        ids = self.prompt_tokenizer.encode(text, placeholders)
        # Without waiting for the device: the steps before are still at work there.
        return ids.to(self.token_embedding.weight.device, non_blocking=True)

    def forward(self, text: str | Sequence[str], embedding_manager: Any = None) -> Tensor:
        """Encode prompts as [B, max_length, d].

        The manager, if given, is called with the token ids [B, L] and their embeddings [B, L, d], before
        position embeddings are added, and returns the embeddings to go on with.
        """
        return self.embed_ids(self.token_ids(text, embedding_manager), embedding_manager)

    def encode(self, text: str | Sequence[str], embedding_manager: Any = None) -> Tensor:
        """The same as calling the encoder."""
        return self(text, embedding_manager=embedding_manager)

    def freeze(self) -> TextEncoder:
        """Switch to evaluation and exclude every parameter from training."""
        return self.eval().requires_grad_(False)


class TransformerEmbedder(nn.Module):
    """Token ids [B, L] through an untied transformer: [B, L, n_embed]."""

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: Any = None
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, Encoder(n_embed, n_layer))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device))

    def encode(self, tokens: Tensor) -> Tensor:
        """The same as calling the encoder."""
        return self(tokens)


class ClassEmbedder(nn.Module):
    """A batch's class numbers [B], found under `key`, as a context of one vector: [B, 1, embed_dim]."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        return self.embedding(batch[self.key if key is None else key][:, None])


class SpatialRescaler(nn.Module):
    """Scale [B, C, H, W] by `multiplier`, `n_stages` times, then map channels if `out_channels` is given."""

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise UserError(f"SpatialRescaler: n_stages is {n_stages}; use 0 or more")
        if method not in self.METHODS:
            raise UserError(
                f"SpatialRescaler: unknown method '{method}'; use one of {', '.join(self.METHODS)}"
            )
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x) if hasattr(self, "channel_mapper") else x

    def encode(self, x: Tensor) -> Tensor:
        """The same as calling the rescaler."""
        return self(x)
