"""Text, class and spatial encoders, under the names that YAML files use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

# In transformers 5 aliases that are made at run time.
from transformers import BertTokenizerFast, CLIPTokenizerFast  # type: ignore[attr-defined]  # isort: skip

from ldm.files import require_files
from ldm.modules.encoders.base import (
    WEIGHTS,
    PromptEncoder,
    ignore_device,
    read_tokenizer,
    reading,
)
from ldm.modules.encoders.clip_text import CLIPText
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder
from ldm.modules.personalization import Personalization, Replacement
from ldm.modules.prompt_tokenizer import PromptTokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import UserError, pretrained_wanted

__all__ = [
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "SpatialRescaler",
    "TransformerEmbedder",
]


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

    Args:
        vq_interface: whether `encode` returns the tuple that a first stage with discrete codes returns.
        tokenizer: a folder or a hub name.
        vocab_size: number of rows of the embedding table, by default that of the tokenizer.
    Raises:
        UserError: the folder has no vocabulary, or the hub cannot be reached.
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


class BERTEmbedder(PromptEncoder):
    """The text encoder of LDM text2img-large: prompts to [B, max_seq_len, n_embed], normalised.

    Args:
        use_tokenizer: False if the prompts are token ids [B, L] already.
        tokenizer: a folder or a hub name.
    Raises:
        UserError: as BERTTokenizer, and for a tokenizer with more words than `vocab_size`.
    """

    family = "bert"
    causal = False

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

    def token_ids(
        self, text: str | Sequence[str] | Tensor, embedding_manager: Personalization | None = None
    ) -> Tensor:
        if isinstance(text, Tensor):
            return text.to(self.token_embedding.weight.device)
        return super().token_ids(text, embedding_manager)

    def embed_ids(self, ids: Tensor, embedding_manager: Replacement | None = None) -> Tensor:
        return self.transformer(ids, embedding_manager)


class FrozenCLIPEmbedder(PromptEncoder):
    """The text encoder of Stable Diffusion v1: prompts to CLIP's last hidden state, [B, max_length, d].

    Frozen when built; `requires_grad_(True)` makes it trainable. It stays in evaluation mode, because the CLIP models
    in use have no dropout. Inside `ldm.util.skip_pretrained()` only its configuration and tokenizer are read, and the
    weights are random.

    Args:
        version: a folder or a hub name.
        max_length: number of tokens of an encoded prompt.
        tokenizer: folder or hub name of the tokenizer (default: `version`).
        image_tower: folder or hub name of the image tower of the same CLIP (default: `version`), for callers that
            compare images with prompts; it is not read here.
    Raises:
        UserError: the folder lacks a file, the hub cannot be reached, or `max_length` exceeds the positions.
    """

    family = "clip"

    family = "clip"

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: Any = None,
        max_length: int = 77,
        image_tower: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        self.max_length = max_length
        if image_tower is not None:
            require_files(f"image_tower '{image_tower}'", image_tower)
        self.image_tower = image_tower or version
        config, self.tokenizer, model = _read_clip(version, tokenizer or version)
        if max_length > config.max_position_embeddings:
            raise UserError(
                f"text encoder '{version}' has {config.max_position_embeddings} positions, fewer than "
                f"max_length {max_length}; set max_length: {config.max_position_embeddings}"
            )
        self.transformer = CLIPText(model)
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

    def embed_ids(self, ids: Tensor, embedding_manager: Replacement | None = None) -> Tensor:
        return self.transformer(ids, embedding_manager)

    def train(self, mode: bool = True) -> FrozenCLIPEmbedder:
        """Stay in evaluation mode, whatever the surrounding model does."""
        return super().train(False)


def _read_clip(version: str, tokenizer_source: str) -> tuple[CLIPTextConfig, Any, CLIPTextModel]:
    """Configuration, tokenizer and text model of a folder or hub name; random weights in `skip_pretrained()`."""
    what = f"text encoder '{version}'"
    tokenizer_files, wanted = ("tokenizer.json", "vocab.json"), pretrained_wanted()
    require_files(what, version, ("config.json",), *([WEIGHTS] if wanted else []))
    if tokenizer_source != version:
        what = f"tokenizer '{tokenizer_source}'"
    require_files(what, tokenizer_source, tokenizer_files)
    tokenizer = read_tokenizer(CLIPTokenizerFast, what, tokenizer_source)
    with reading(what, version):
        config = CLIPTextConfig.from_pretrained(version)
        if not wanted:
            return config, tokenizer, CLIPTextModel(config)
        read: Any = CLIPTextModel.from_pretrained(version, config=config, output_loading_info=True)
        model, report = read
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise UserError(f"{what} lacks the weight '{missing[0]}' ({len(missing)} in all); download it again")
    return config, tokenizer, model.float()
