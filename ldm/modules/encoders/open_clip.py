"""OpenCLIP's text tower, the text encoder of Stable Diffusion 2, under the names of its checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # in transformers 5 an alias made at run time

from ldm.files import require_files
from ldm.modules.encoders.base import PromptEncoder, ignore_device, logger, read_tokenizer
from ldm.modules.personalization import Replacement
from ldm.modules.prompt_tokenizer import PromptTokenizer, embed_tokens
from ldm.util import ConfigError, UserError, pretrained_wanted

# Sizes of the text towers that published models use (open_clip's model configurations of these names).
ARCHITECTURES: dict[str, dict[str, int]] = {
    "ViT-L-14": {"width": 768, "heads": 12, "layers": 12},
    "ViT-H-14": {"width": 1024, "heads": 16, "layers": 24},
    "ViT-bigG-14": {"width": 1280, "heads": 20, "layers": 32},
}
VOCABULARY, POSITIONS = 49408, 77
# How many of the last blocks an output leaves out.
LAYERS = {"last": 0, "penultimate": 1}


class ResidualAttentionBlock(nn.Module):
    """Causal self-attention and a two-layer perceptron, both pre-normalised; [B, L, d] -> [B, L, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPText(nn.Module):
    """The text tower of a CLIP trained with open_clip: token ids [B, L] to hidden states [B, L, d].

    Args:
        width, heads, layers: sizes, see `ARCHITECTURES`.
        vocabulary: number of tokens; larger than CLIP's where another tool has added words to a model.
    """

    def __init__(self, width: int, heads: int, layers: int, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(POSITIONS, width))
        blocks = (ResidualAttentionBlock(width, heads) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, width) * width**-0.5)
        # Of contrastive training; checkpoints hold it.
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(
        self,
        ids: Tensor,
        embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None,
        skip_last: int = 0,
    ) -> Tensor:
        """The hidden states before `ln_final`, without the last `skip_last` blocks; ids [B, L] -> [B, L, d]."""
        x = embed_tokens(self.token_embedding, ids, embedding_manager)
        x = x + self.positional_embedding[: x.shape[1]].to(x.dtype)
        blocks = self.blocks()
        return _run(blocks[: len(blocks) - skip_last], x)

    def blocks(self) -> list[nn.Module]:
        """The blocks in order."""
        return list(self.transformer["resblocks"].children())

    def pooled(self, hidden: Tensor, places: Tensor, skipped: int = 0) -> Tensor:
        """The projected output at one place of each prompt: [B, L, d] and [B] -> [B, d].

        Args:
            hidden: hidden states without the last `skipped` blocks, as `forward` returns them.
            places: of the end tokens.
        """
        blocks = self.blocks()
        hidden = self.ln_final(_run(blocks[len(blocks) - skipped :], hidden))
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, places] @ self.text_projection.to(hidden.dtype)


def _run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Hidden states [B, L, d] through blocks, in which no token looks ahead."""
    length = x.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)  # True is not attended to
    for block in blocks:
        x = block(x, mask)
    return x


class FrozenOpenCLIPEmbedder(PromptEncoder):
    """The text encoder of Stable Diffusion 2: prompts to OpenCLIP's normalised hidden states, [B, max_length, d].

    Its weights come from the checkpoint of the diffusion model. Prompts are padded with 0, as open_clip does.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with width, heads and layers, and with the size of the vocabulary
            if that is not CLIP's.
        version: the training run of open_clip that the weights are from; only noted.
        max_length: number of tokens of an encoded prompt.
        freeze: exclude the parameters from training.
        layer: "last", or "penultimate" for the output of the block before the last one (Stable Diffusion 2).
        tokenizer: folder or hub name of CLIP's tokenizer.
    Raises:
        UserError: an unknown `arch` or `layer`, or a tokenizer that cannot be read.
    """

    family = "clip"

    def __init__(
        self,
        arch: str | Mapping[str, int] = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: Any = None,
        max_length: int = POSITIONS,
        freeze: bool = True,
        layer: str = "last",
        tokenizer: str = "openai/clip-vit-large-patch14",
    ) -> None:
        super().__init__()
        ignore_device(type(self).__name__, device)
        if layer not in LAYERS:
            raise ConfigError(
                f"FrozenOpenCLIPEmbedder: layer '{layer}' is unknown; use {' or '.join(LAYERS)}"
            )
        if isinstance(arch, str) and arch not in ARCHITECTURES:
            raise ConfigError(
                f"FrozenOpenCLIPEmbedder: arch '{arch}' is unknown; use one of {', '.join(ARCHITECTURES)}"
            )
        if max_length > POSITIONS:
            raise UserError(f"OpenCLIP has {POSITIONS} positions, fewer than max_length {max_length}")
        what = f"tokenizer '{tokenizer}'"
        require_files(what, tokenizer, ("tokenizer.json", "vocab.json"))
        self.max_length, self.layer, self.version = max_length, layer, version
        self.tokenizer = read_tokenizer(CLIPTokenizerFast, what, tokenizer)
        self.model = OpenCLIPText(**(ARCHITECTURES[arch] if isinstance(arch, str) else dict(arch)))
        if pretrained_wanted():
            logger.warning(
                "OpenCLIP's weights come with the checkpoint of a diffusion model; until then they are random"
            )
        self.prompt_tokenizer = PromptTokenizer(
            self.tokenizer,
            max_length=max_length,
            vocab_size=self.model.token_embedding.num_embeddings,
            start_id=self.tokenizer.bos_token_id,
            end_id=self.tokenizer.eos_token_id,
            pad_id=0,
        )
        if freeze:
            self.freeze()

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.model.token_embedding

    def embed_ids(self, ids: Tensor, embedding_manager: Replacement | None = None) -> Tensor:
        return self.model.ln_final(self.model(ids, embedding_manager, skip_last=LAYERS[self.layer]))
