"""The text encoder of LDM text2img-large: a WordPiece tokenizer and a transformer trained with the UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizerFast

from ldm.modules.encoders.basic import TextEncoder, ignore_device
from ldm.modules.encoders.hub import read_tokenizer, require_files
from ldm.modules.tokens import PromptTokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper


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
