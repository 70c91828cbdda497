"""Convolutional networks: for images, sound and clips."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


def _norm(channels: int) -> nn.GroupNorm:
    # 32 groups, the usual number, and never a group of one channel, whose gradient vanishes on a 1x1 image.
    return nn.GroupNorm(min(32, channels // 2), channels)


class MnistCnn(nn.Module):
    """The MNIST network of the Opacus tutorial."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(width, 2 * width, 4, 2)
        self.fc1 = nn.Linear(2 * width * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`x (b, 1, 28, 28)` to logits `(b, 10)`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


class Convnet(nn.Sequential):
    """Four convolutions with pooling between them: the CIFAR-10 network of the Opacus examples."""

    def __init__(self, width: int = 32) -> None:
        widths = (3, width, 2 * width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1], 10))


class Separable(nn.Sequential):
    """MobileNet's blocks: a convolution of each channel, then one across channels at each position."""

    def __init__(self, width: int = 32) -> None:
        widths = (width, 2 * width, 4 * width, 8 * width)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), _norm(width), nn.ReLU()]
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv2d(inner, inner, 3, 2, padding=1, groups=inner, bias=False), _norm(inner), nn.ReLU()]
            layers += [nn.Conv2d(inner, outer, 1, bias=False), _norm(outer), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Audio(nn.Sequential):
    """M5, on the samples of a sound themselves: its first kernel is 80 long (Dai et al. 2017), with GroupNorm."""

    def __init__(self, width: int = 32, stride: int = 4) -> None:
        layers: list[nn.Module] = [nn.Conv1d(1, width, 80, stride), _norm(width), nn.ReLU(), nn.MaxPool1d(4)]
        for inner, outer in itertools.pairwise((width, width, 2 * width, 4 * width)):
            layers += [nn.Conv1d(inner, outer, 3), _norm(outer), nn.ReLU(), nn.MaxPool1d(4)]
        layers[-1] = nn.AdaptiveAvgPool1d(1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


class Clips(nn.Sequential):
    """Three convolutions over time and space."""

    def __init__(self, width: int = 16) -> None:
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [nn.Conv3d(inner, outer, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


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
