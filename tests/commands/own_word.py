"""A personalization as a user may write it, which a YAML names as a target."""

from __future__ import annotations

import torch
from torch import nn

from ldm.modules.personalization import Personalization


class OwnWord(nn.Module, Personalization):
    """A user's personalization that does not take vectors; its file looks like one of another tool."""

    def __init__(self, embedder) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(embedder.width))
        token = embedder.prompt_tokenizer.placeholder_id("<own>", 0)
        self.string_to_token_dict = {"<own>": torch.tensor(token)}

    def forward(self, tokenized_text, embedded_text):
        here = tokenized_text == self.string_to_token_dict["<own>"]
        return torch.where(here[..., None], self.vector, embedded_text)

    def embedding_parameters(self):
        return [self.vector]

    def save(self, path) -> None:
        torch.save({"<own>": self.vector.detach()[None]}, path)

    def load(self, path) -> None:
        self.vector.data = torch.load(path)["<own>"][0]
