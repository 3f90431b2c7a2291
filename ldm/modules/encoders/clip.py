"""CLIP's text encoder, opened between its token and its position embeddings.

The embeddings module of transformers' CLIPTextModel is exchanged for `PromptEmbeddings`, so that the embedding
manager sees (token ids, embedded tokens) before positions are added. This file is the only one that knows
how transformers lays the model out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from ldm.modules.attend import is_short
from ldm.modules.encoders.basic import TextEncoder, ignore_device
from ldm.modules.encoders.hub import WEIGHTS, read_tokenizer, reading, require_files
from ldm.modules.tokens import PromptTokenizer, embed_tokens
from ldm.util import UserError, pretrained_wanted

Manager = Callable[[Tensor, Tensor], Tensor]

# What a call of the text model is about: the ids before virtual ones are replaced, and the manager.
_call: ContextVar[tuple[Tensor, Manager | None] | None] = ContextVar("clip_call", default=None)


class PromptEmbeddings(nn.Module):
    """Token plus position embeddings, [B, L] -> [B, L, d], with a manager's say in between."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.token_embedding = original.token_embedding
        self.position_embedding = original.position_embedding

    def forward(self, input_ids: Tensor, position_ids: None = None, inputs_embeds: None = None) -> Tensor:
        ids, manager = _call.get() or (input_ids, None)
        embedded = embed_tokens(self.token_embedding, ids, manager)
        return embedded + self.position_embedding.weight[: embedded.shape[1]].to(embedded.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "position_ids", None)  # old checkpoints hold the numbers 0..76 as a buffer
        super()._load_from_state_dict(state_dict, prefix, *rest)


@contextmanager
def _prompt(ids: Tensor, manager: Manager | None) -> Iterator[None]:
    token = _call.set((ids, manager))
    try:
        yield
    finally:
        _call.reset(token)


def open_text_model(model: nn.Module) -> nn.Module:
    """Hold the text model as `.text_model`, as checkpoints name it, with its embeddings exchanged.

    transformers up to 4 keeps it there itself, inside CLIPTextModel; in 5 CLIPTextModel is the text model.
    """
    holder = nn.Module()
    holder.text_model = getattr(model, "text_model", model)
    holder.text_model.embeddings = PromptEmbeddings(holder.text_model.embeddings)
    return holder


class FrozenCLIPEmbedder(TextEncoder):
    """Prompts to the last hidden state of CLIP's text model, after its final norm: [B, max_length, d].

    `version` is a folder or a hub name. `image_tower` (None: `version`) says where the picture tower of the same
    CLIP is, for those who compare prompts with pictures; it is not read here. Inside `ldm.util.skip_pretrained()`
    only the encoder's configuration and tokenizer are read and the weights are fresh. Frozen when built;
    `requires_grad_(True)` makes it trainable, and the CLIP models in use have no dropout, so it stays in evaluation
    mode. Raises UserError for a folder that lacks something, a hub that cannot be reached, and a `max_length` beyond
    the positions.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: Any = None,
        max_length: int = 77,
        image_tower: str | None = None,
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        self.max_length = max_length
        if image_tower is not None:
            require_files(f"image_tower '{image_tower}'", image_tower)
        self.image_tower = image_tower or version
        config, self.tokenizer, model = _read(version)
        if max_length > config.max_position_embeddings:
            raise UserError(
                f"text encoder '{version}' has {config.max_position_embeddings} positions, fewer than "
                f"max_length {max_length}; set max_length: {config.max_position_embeddings}"
            )
        self.transformer = open_text_model(model)
        self.prompt_tokenizer = PromptTokenizer(
            self.tokenizer,
            max_length=max_length,
            vocab_size=config.vocab_size,
            start_id=self.tokenizer.bos_token_id,
            end_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
        )
        self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.transformer.text_model.embeddings.token_embedding

    def embed_ids(self, ids: Tensor, embedding_manager: Manager | None = None) -> Tensor:
        valid = ids.masked_fill(ids >= self.token_embedding.num_embeddings, 0)
        self._attend_as_suits(ids)
        with _prompt(ids, embedding_manager):
            return self.transformer.text_model(input_ids=valid).last_hidden_state

    def _attend_as_suits(self, ids: Tensor) -> None:
        """Attend by the product or by the fused kernel, as the denoiser does for what is as long."""
        model = self.transformer.text_model
        kind = "eager" if is_short(ids.shape[1], ids.shape[1], ids.device) else "sdpa"
        # In older transformers the kind is settled when the model is built.
        if model.config._attn_implementation != kind and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(kind)

    def train(self, mode: bool = True) -> FrozenCLIPEmbedder:
        """Stay in evaluation mode, whatever the model around it does."""
        return super().train(False)


def _read(version: str) -> tuple[CLIPTextConfig, CLIPTokenizerFast, CLIPTextModel]:
    what = f"text encoder '{version}'"
    tokenizer_files, wanted = ("tokenizer.json", "vocab.json"), pretrained_wanted()
    require_files(what, version, ("config.json",), tokenizer_files, *([WEIGHTS] if wanted else []))
    tokenizer = read_tokenizer(CLIPTokenizerFast, what, version)
    with reading(what, version):
        config = CLIPTextConfig.from_pretrained(version)
        if not wanted:
            return config, tokenizer, CLIPTextModel(config)
        model, report = CLIPTextModel.from_pretrained(version, config=config, output_loading_info=True)
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise UserError(f"{what} lacks the weight '{missing[0]}' ({len(missing)} in all); download it again")
    return config, tokenizer, model.float()
