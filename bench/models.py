"""The networks, made of plain torch modules, so that methods that hook modules can run them too."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers[:-1])


class MnistCnn(nn.Module):
    """The MNIST network of the Opacus tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, 1, 28, 28)` to logits `(b, 10)`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


class Convnet(nn.Sequential):
    """Four convolutions with pooling between them: the CIFAR-10 network of the Opacus examples."""

    def __init__(self) -> None:
        widths = (3, 32, 64, 64, 128)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1], 10))


class Lstm(nn.Module):
    """A plain `nn.LSTM`, its last output classified."""

    def __init__(self, inner: int = 64, hidden: int = 128, classes: int = 10) -> None:
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

    def __init__(self, vocabulary: int = 20000, dim: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (b, t)` to logits `(b, classes)`."""
        out: Tensor = self.head(self.token(tokens).mean(1))
        return out


def _norm(channels: int) -> nn.GroupNorm:
    # 32 groups, the usual number, and never a group of one channel, whose gradient vanishes on a 1x1 image.
    return nn.GroupNorm(min(32, channels // 2), channels)


class Block(nn.Module):
    """The basic residual block of ResNet-18."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = _norm(outer)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.short = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), _norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, inner, h, w)` to `(b, outer, h / stride, w / stride)`."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling, and GroupNorm for BatchNorm, which mixes samples."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = _norm(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage, (inner, outer) in enumerate(itertools.pairwise(widths)):
            blocks += [Block(inner, outer, 1 if stage == 0 else 2), Block(outer, outer, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, 3, h, w)` to logits `(b, classes)`."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        out: Tensor = self.head(x.mean((2, 3)))
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
    """A small GPT. The head is not tied to the embedding, since some of the peers refuse a weight used twice."""

    def __init__(self, dim: int = 256, length: int = 64, vocabulary: int = 1000, blocks: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(GptBlock(dim, dim // 32) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (b, t)` to logits `(b, t, vocabulary)`."""
        # Expanded to the batch, since the peers' rules of Embedding want each sample to have an index of its own, in memory too.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        out: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))
        return out
