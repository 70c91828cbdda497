"""Compact models of the kinds people train, for tests of whole networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A basic ResNet block with group norm."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, outer)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.GroupNorm(2, outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


def resnet18(width: int = 4, classes: int = 7) -> nn.Module:
    """ResNet-18 with GroupNorm; ``width`` is the number of channels of the first stage (64 in the paper)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(2, width), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inner = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        outer = width * 2**stage
        layers += [Residual(inner, outer, stride), Residual(outer, outer, 1)]
        inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(inner, classes))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention, on ``[..., t, width]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A small GPT-2 with tied embeddings; tokens ``[..., t]`` to logits ``[..., t, tokens]``."""

    def __init__(self, tokens: int = 11, width: int = 8, heads: int = 2, depth: int = 2, length: int = 9) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm over the channels, and an inverted bottleneck with a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).movedim(-3, -1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.movedim(-1, -3)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)


def convnext(width: int = 4, classes: int = 7) -> nn.Module:
    """A two-stage ConvNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4),
        ChannelNorm(width),
        ConvNeXtBlock(width),
        ChannelNorm(width),
        nn.Conv2d(width, 2 * width, 2, 2),
        ConvNeXtBlock(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(-3),
        nn.LayerNorm(2 * width),
        nn.Linear(2 * width, classes),
    )
