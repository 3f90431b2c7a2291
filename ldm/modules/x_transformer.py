"""The bidirectional transformer of LDM's text encoder, with the parameter names of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import attend
from ldm.modules.prompt_tokenizer import embed_tokens


class Attention(nn.Module):
    """Multi-head self-attention without a mask, [B, L, dim] -> the same: as published, padding is attended to too."""

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them; [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        # The identity was a dropout; with it, checkpoints name the second linear layer `net.2`.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU()), nn.Identity(), nn.Linear(dim * mult, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """`depth` pairs of attention and feed-forward layers, each normalised first: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, dim: int, depth: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), Attention(dim, heads, dim_head)]))
            self.layers.append(nn.ModuleList([nn.LayerNorm(dim), FeedForward(dim)]))

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            norm, layer = pair
            x = x + layer(norm(x))
        return x


class AbsolutePositionalEmbedding(nn.Module):
    """One learned vector per position: length -> [length, dim]."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)

    def forward(self, length: int) -> Tensor:
        return self.emb.weight[:length]


class TransformerWrapper(nn.Module):
    """An `Encoder` with token and position embeddings before it and a norm after it."""

    def __init__(
        self, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        # The language-model head is never called, but every LDM checkpoint holds its weights.
        self.to_logits = nn.Linear(dim, num_tokens).requires_grad_(False)
        for table in (self.token_emb, self.pos_emb.emb):
            nn.init.normal_(table.weight, std=0.02)

    def forward(
        self, ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Encode token ids [B, L] as [B, L, dim]; the embedding manager may replace token embeddings."""
        x = embed_tokens(self.token_emb, ids, embedding_manager)
        x = self.emb_dropout(x + self.pos_emb(ids.shape[1]))
        return self.norm(self.attn_layers(x))
