"""The shapes of the micro-benchmarks, and when an answer is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Conv:
    """Input `(n, c, *s)`, weight `(o, c / groups, *k)`."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def options(self) -> tuple[int, int, int, int]:
        """In the order of torch.nn.grad."""
        return self.stride, self.padding, self.dilation, self.groups

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """The convolution, of a batch or of one sample."""
        out: Tensor = CONV[len(self.input) - 2](x, weight, None, *self.options)
        return out


CONVS = (
    Conv("mnist-first", (256, 1, 28, 28), (16, 1, 8, 8), stride=2, padding=3),
    Conv("mnist-second", (256, 16, 13, 13), (32, 16, 4, 4), stride=2),
    Conv("resnet-early", (8, 64, 32, 32), (64, 64, 3, 3), padding=1),
    Conv("resnet-late", (8, 512, 4, 4), (512, 512, 3, 3), padding=1),
    Conv("resnet-short", (8, 64, 32, 32), (128, 64, 1, 1), stride=2),
    Conv("depthwise", (32, 64, 14, 14), (64, 1, 3, 3), padding=1, groups=64),
    Conv("dilated", (16, 32, 20, 20), (32, 32, 3, 3), padding=2, dilation=2),
    Conv("audio", (16, 1, 8000), (64, 1, 80), stride=4),
    Conv("video", (4, 8, 8, 16, 16), (16, 8, 3, 3, 3), padding=1),
)
# n, positions (0: none), in, out
LINEARS = (
    (128, 0, 784, 1024),
    (256, 0, 512, 32),
    (8, 0, 16, 32),
    (16, 64, 256, 1024),
    (16, 64, 256, 1000),
    (4, 1024, 64, 64),
)
# n, positions, vocabulary, dim
EMBEDDINGS = ((16, 64, 1000, 256), (8, 128, 5000, 32))


def assert_close(got: Tensor, want: Tensor) -> None:
    """Rounding of long float32 sums is relative to the largest entry, not to each."""
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-4)
