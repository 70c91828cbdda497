"""The geometry of a convolution, and its input seen as windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding and dilation, one entry for each spatial axis, and the number of groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def locations(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many output locations an input of these sizes has along each axis."""
        axes = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in axes)

    def weight_shape(self, x: Sequence[int], g: Sequence[int]) -> tuple[int, ...]:
        """One sample's `(o, i, *k)` for the shapes `x (n, b, c, *s)` and `g (n, b, o, *l)`."""
        return (g[2], x[2] // self.groups, *self.kernel)


def windows(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """The input under each output location, as a view of the padded input.

    Args:
        x: `(n, b, c, *s)`.
        geometry: of the convolution.

    Returns:
        `(n, b, c, *l, *k)`.
    """
    if any(geometry.padding):
        x = F.pad(x, [p for padding in reversed(geometry.padding) for p in (padding, padding)])
    axes = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(axes, start=3):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x
