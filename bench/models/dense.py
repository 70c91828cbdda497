"""Linear layers, and a mixture of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers[:-1])


class Experts(nn.Module):
    """A mixture of experts: each token is sent through those that score highest, and the text's mean is classified.

    Every expert sees every token, and the weight of those not chosen is zero: a choice that `vmap` can run.
    """

    def __init__(self, dim: int = 64, vocabulary: int = 1000, experts: int = 8, chosen: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.chosen = chosen
        self.token = nn.Embedding(vocabulary, dim)
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(Mlp(dim, 2 * dim, dim) for _ in range(experts))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (b, t)` to logits `(b, 10)`."""
        x = self.token(tokens)
        scores = self.gate(x)
        least = scores.topk(self.chosen).values[..., -1:]
        weights = scores.masked_fill(scores < least, float("-inf")).softmax(-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1) @ weights.unsqueeze(-1)
        out: Tensor = self.head(self.norm(x + mixed.squeeze(-1)).mean(1))
        return out
