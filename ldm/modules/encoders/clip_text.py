"""CLIP's text model with replaced forward methods, so that an embedding manager can change token embeddings.

This is the only file that knows how transformers lays its CLIP text model out: up to version 4 inside a shell as
`.text_model`, from version 5 on as `CLIPTextModel` itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import is_short
from ldm.modules.prompt_tokenizer import embed_tokens

# (token ids [B, L], token embeddings [B, L, d]) -> token embeddings [B, L, d]
Manager = Callable[[Tensor, Tensor], Tensor]


class CLIPText(nn.Module):
    """Hold transformers' CLIP text model as `.text_model`, the name in checkpoints, with two forwards replaced.

    The frozen model, its submodules and its state dict stay transformers' own. Replaced are the forward methods of
    the text model and of its embeddings: both take an `embedding_manager`, which is called between the look-up of
    the token embeddings and the addition of the position embeddings.

    Args:
        model: a `CLIPTextModel` of transformers 4 or 5.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model: Any = getattr(model, "text_model", model)
        # The constant positions 0, 1, 2, ... are not needed here, and some versions save them.
        self.text_model.embeddings._buffers.pop("position_ids", None)
        # Partials, unlike bound methods, belong to the copy in a copied or unpickled module.
        self.text_model.embeddings.forward = partial(_embeddings_forward, self.text_model.embeddings)
        self.text_model.forward = partial(_text_model_forward, self.text_model)

    def forward(
        self, input_ids: Tensor, embedding_manager: Manager | None = None, skip_last: int = 0
    ) -> Tensor:
        """Token ids [B, L] to the last hidden state after the final norm, [B, L, d].

        Ids beyond the vocabulary stand for placeholders without a token of their own; only the manager sees them.
        With `skip_last` it is the hidden state before so many of the last layers, without the final norm.
        """
        return self.text_model(input_ids, embedding_manager=embedding_manager, skip_last=skip_last)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Checkpoints of older transformers hold the constant positions.
        state_dict.pop(f"{prefix}text_model.embeddings.position_ids", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _embeddings_forward(self: Any, input_ids: Tensor, embedding_manager: Manager | None = None) -> Tensor:
    """Replaces `CLIPTextEmbeddings.forward`: token embeddings, then the manager, then position embeddings."""
    embedded = embed_tokens(self.token_embedding, input_ids, embedding_manager)
    return embedded + self.position_embedding.weight[: embedded.shape[1]].to(embedded.dtype)


def _text_model_forward(
    self: Any, input_ids: Tensor, embedding_manager: Manager | None = None, skip_last: int = 0
) -> Tensor:
    """Replaces the forward of the text model: embeddings, causal transformer, final norm."""
    embedded = self.embeddings(input_ids, embedding_manager=embedding_manager)
    length = embedded.shape[1]
    fused = _choose_attention(self, embedded)
    encoder = _without_last(self.encoder, skip_last)
    if "causal_attention_mask" in inspect.signature(encoder.forward).parameters:  # transformers 4
        encoded = encoder(inputs_embeds=embedded, causal_attention_mask=_causal_mask(length, embedded))
    else:
        mask = None if fused else _causal_mask(length, embedded)
        encoded = encoder(inputs_embeds=embedded, attention_mask=mask, is_causal=True)
    hidden = encoded.last_hidden_state
    return hidden if skip_last else self.final_layer_norm(hidden)


def _without_last(encoder: Any, layers: int) -> Any:
    """The same encoder, sharing its weights, without so many of its last layers."""
    if not layers:
        return encoder
    shorter = copy.copy(encoder)
    shorter._modules = {**encoder._modules, "layers": encoder.layers[:-layers]}
    return shorter


def _choose_attention(text_model: Any, embedded: Tensor) -> bool:
    """Choose the faster attention kernel for embeddings [B, L, d]; return whether it is the fused one."""
    length = embedded.shape[1]
    kind = "eager" if is_short(length, length, embedded) else "sdpa"
    # Older versions fix the kernel when the model is built.
    if text_model.config._attn_implementation != kind and hasattr(text_model, "set_attn_implementation"):
        text_model.set_attn_implementation(kind)
    return text_model.config._attn_implementation == "sdpa"


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """What is added to attention scores: the lowest number where a token would look ahead, else 0; [1, 1, L, L]."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=like.dtype, device=like.device).triu(1)
