"""Networks over sequences: recurrent, embeddings, transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lstm(nn.Module):
    """A plain `nn.LSTM`, its last output classified."""

    def __init__(self, hidden: int = 128, inner: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inner, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, t, inner)` to logits `(b, classes)`."""
        outputs, _ = self.lstm(x)
        out: Tensor = self.head(outputs[:, -1])
        return out


class MeanEmbedding(nn.Module):
    """The mean of a text's embeddings, classified: nearly all of the gradient is zero."""

    def __init__(self, dim: int = 128, vocabulary: int = 20000, classes: int = 10) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (b, t)` to logits `(b, classes)`."""
        out: Tensor = self.head(self.token(tokens).mean(1))
        return out


class Attention(nn.Module):
    """Causal self-attention by `F.scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, t, d)` to `(b, t, d)`."""
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, d // self.heads).transpose(1, 2) for z in self.qkv(x).split(d, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return out


class GptBlock(nn.Module):
    """A transformer block with the norms in front."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, t, d)` to `(b, t, d)`."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Gpt(nn.Module):
    """A small GPT. Where the head is tied to the embedding, some of the peers refuse the weight that is used twice."""

    def __init__(self, dim: int = 256, length: int = 64, vocabulary: int = 1000, blocks: int = 4, *, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(GptBlock(dim, max(1, dim // 32)) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (b, t)` to logits `(b, t, vocabulary)`."""
        # Expanded to the batch, since the peers' rules of Embedding want each sample to have an index of its own, in memory too.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        out: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))
        return out
