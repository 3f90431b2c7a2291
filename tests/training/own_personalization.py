"""A personalization as a stranger would write it, from `ldm.modules.personalization` alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import pickles
from ldm.files import atomic_write
from ldm.modules.personalization import Personalization, TextEncoder


class Offset(nn.Module, Personalization):
    """Learn what is added to the embedding of one word; the file holds that offset [d]."""

    def __init__(self, embedder: TextEncoder, word: str = "*") -> None:
        super().__init__()
        self.string_to_token_dict = {word: torch.tensor(embedder.prompt_tokenizer.placeholder_id(word, 0))}
        self.offset = nn.Parameter(torch.zeros(embedder.width))

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        (token,) = self.string_to_token_dict.values()
        is_word = tokenized_text == int(token)
        return embedded_text + is_word.unsqueeze(-1) * self.offset

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [self.offset]

    def save(self, path: str | Path) -> None:
        offset = self.offset.detach().cpu()
        atomic_write(path, lambda file: torch.save({"offset": offset}, file))

    def load(self, path: str | Path) -> None:
        self.offset.data.copy_(pickles.load(path)["offset"])
        self.loaded = True
