"""Text, class and spatial encoders, under the names that YAML files use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizerFast, CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from ldm.modules.attention import is_short
from ldm.modules.encoders.base import WEIGHTS, read_tokenizer, reading, require_files
from ldm.modules.prompt_tokenizer import PromptTokenizer, embed_tokens
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import UserError, pretrained_wanted

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


class BERTTokenizer(nn.Module):
    """Prompts to BERT's token ids [B, max_length], on the CPU.

    `tokenizer` is a folder or a hub name. With `vq_interface`, `encode` answers as a first stage of discrete
    codes does. Raises UserError for a folder without vocabulary and a hub that cannot be reached.
    """

    def __init__(
        self,
        device: Any = None,
        vq_interface: bool = True,
        max_length: int = 77,
        tokenizer: str = "bert-base-uncased",
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        what = f"tokenizer '{tokenizer}'"
        require_files(what, tokenizer, ("vocab.txt", "tokenizer.json"))
        self.tokenizer = read_tokenizer(BertTokenizerFast, what, tokenizer)
        self.vq_interface = vq_interface
        self.max_length = max_length
        self.prompt_tokenizer = PromptTokenizer(
            self.tokenizer,
            max_length=max_length,
            vocab_size=len(self.tokenizer) if vocab_size is None else vocab_size,
            start_id=self.tokenizer.cls_token_id,
            end_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
        )

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return self.prompt_tokenizer.encode(text)

    def encode(self, text: str | Sequence[str]) -> Any:
        """The ids, or (None, None, [None, None, ids]) with `vq_interface`."""
        ids = self(text)
        return (None, None, [None, None, ids]) if self.vq_interface else ids

    def decode(self, ids: Tensor) -> str:
        """One row of ids [L] as text, special tokens included."""
        return self.tokenizer.decode(ids)


class BERTEmbedder(TextEncoder):
    """Prompts to the transformer's normalised output: [B, max_seq_len, n_embed].

    `tokenizer` is a folder or a hub name; without `use_tokenizer` the prompts are token ids [B, L] already.
    Raises UserError as BERTTokenizer does, and for a tokenizer with more words than `vocab_size`.
    """

    family = "bert"

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: Any = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: str = "bert-base-uncased",
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        self.max_length = max_seq_len
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(max_length=max_seq_len, tokenizer=tokenizer, vocab_size=vocab_size)
            self.prompt_tokenizer = self.tknz_fn.prompt_tokenizer
        self.transformer = TransformerWrapper(
            vocab_size, max_seq_len, Encoder(n_embed, n_layer), emb_dropout=embedding_dropout
        )

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.transformer.token_emb

    def token_ids(self, text: str | Sequence[str] | Tensor, embedding_manager: Any = None) -> Tensor:
        if isinstance(text, Tensor):
            return text.to(self.token_embedding.weight.device)
        return super().token_ids(text, embedding_manager)

    def embed_ids(
        self, ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        return self.transformer(ids, embedding_manager)


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

    family = "clip"

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
