"""The text encoder of Stable Diffusion XL: two CLIP text towers side by side, under the names of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.base import PromptEncoder, ignore_device
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.open_clip import FrozenOpenCLIPEmbedder
from ldm.modules.personalization import Personalization, Replacement
from ldm.modules.prompt_tokenizer import embed_tokens, place_after_insertion

# Both towers leave out their last block, and the norm after it (Podell et al. 2023, section 2.1).
SKIPPED = 1


class FrozenSDXLEmbedder(PromptEncoder):
    """The text encoder of Stable Diffusion XL: prompts to hidden states of two towers, and a pooled vector.

    Encoding returns {"c_crossattn": [[B, L, 768 + 1280]], "c_adm": [[B, 1280]]}: the hidden states of CLIP ViT-L and of
    OpenCLIP ViT-bigG side by side, both before the last block, and OpenCLIP's projected output at the end token. A
    token embedding is that of both towers side by side, so that a personalization learns vectors [N, 768 + 1280]; it is
    called once for both. OpenCLIP's weights come from the checkpoint of the diffusion model.

    Args:
        version, tokenizer, max_length: of CLIP ViT-L; see `FrozenCLIPEmbedder`.
        arch: of OpenCLIP; see `FrozenOpenCLIPEmbedder`.
    Raises:
        UserError: as those two.
    """

    family = "sdxl"

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        arch: str | Mapping[str, int] = "ViT-bigG-14",
        device: Any = None,
        max_length: int = 77,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        self.max_length = max_length
        tokenizer = tokenizer or version
        first = FrozenCLIPEmbedder(version, max_length=max_length, tokenizer=tokenizer)
        second = FrozenOpenCLIPEmbedder(arch, max_length=max_length, layer="penultimate", tokenizer=tokenizer)
        self.embedders = nn.ModuleList([first, second])
        self.prompt_tokenizer = first.prompt_tokenizer
        self.freeze()

    @property
    def towers(self) -> tuple[FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder]:
        """CLIP ViT-L and OpenCLIP ViT-bigG."""
        first, second = self.embedders
        assert isinstance(first, FrozenCLIPEmbedder) and isinstance(second, FrozenOpenCLIPEmbedder)
        return first, second

    @property
    def token_embedding(self) -> nn.Embedding:
        """The vocabulary's vectors of both towers side by side, [V, d], copied."""
        tables = [tower.token_embedding.weight.detach() for tower in self.towers]
        return nn.Embedding.from_pretrained(torch.cat(tables, dim=1))

    @property
    def width(self) -> int:
        """The width d of a token embedding: the sum of `widths`."""
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the token embeddings of both towers."""
        return tuple(tower.width for tower in self.towers)

    @property
    def device(self) -> torch.device:
        return self.towers[0].device

    @property
    def pooled_width(self) -> int:
        """The width of the pooled vector."""
        return self.towers[1].model.text_projection.shape[1]

    def embed_ids(self, ids: Tensor, embedding_manager: Replacement | None = None) -> dict[str, list[Tensor]]:
        """Token ids [B, L] as the condition of the denoiser, without the sizes of the images."""
        first, second = self.towers
        tokenizer = self.prompt_tokenizer
        is_end = ids == tokenizer.end_id
        ends = is_end.int().argmax(dim=1)
        # Where the first tower's prompts are filled up with end tokens, those of the second are with its own.
        after = is_end.cumsum(dim=1) - is_end.int() > 0
        ids_of = (ids, ids.masked_fill(after, second.prompt_tokenizer.pad_id))
        if embedding_manager is None:
            left, right = None, None
        else:
            pairs = zip(self.towers, ids_of, strict=True)
            embedded = [embed_tokens(tower.token_embedding, own, None) for tower, own in pairs]
            inserted = embedding_manager(ids, torch.cat(embedded, dim=-1))
            left, right = (_always(part) for part in inserted.split(self.widths, dim=-1))
            if isinstance(embedding_manager, Personalization):
                words = embedding_manager.string_to_token_dict
                counts = {int(words[word]): count for word, count in embedding_manager.placeholders.items()}
                ends = place_after_insertion(ids, ends, counts).clamp(max=ids.shape[1] - 1)
        hidden = first.transformer(ids_of[0], left, skip_last=SKIPPED)
        other = second.model(ids_of[1], right, skip_last=SKIPPED)
        pooled = second.model.pooled(other, ends, skipped=SKIPPED)
        return {"c_crossattn": [torch.cat([hidden, other], dim=-1)], "c_adm": [pooled]}

    def train(self, mode: bool = True) -> FrozenSDXLEmbedder:
        """Stay in evaluation mode, whatever the surrounding model does."""
        return super().train(False)


def _always(part: Tensor) -> Any:
    """A manager that returns these embeddings [B, L, d]."""
    return lambda ids, embedded: part
