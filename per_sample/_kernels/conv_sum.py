"""The sum over samples of a convolution's weight gradients."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._kernels.conv import conv_algorithm, conv_weight_grad, missing_locations
from per_sample._kernels.conv_algorithms import unfold
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.functional import must_be_functional
from per_sample._options import current_options


def conv_weight_sum(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False, algorithm: str | None = None) -> Tensor:
    """The sum of what `conv_weight_grad` returns for the same operands, real, `(o, c / groups, *k)`.

    Args:
        x: the input, `(n, b, c, *s)`.
        g: the gradient of the output, `(n, b, o, *l)`.
        geometry: of the convolution.
        functional: use out-of-place differentiable operators only.
        algorithm: one of `SUMS`, instead of the choice by shape.
    """
    algorithm = algorithm or conv_sum_algorithm(x, g, geometry, functional=functional)
    missing = missing_locations(x.shape, g.shape, geometry)
    if missing:
        g = F.pad(g, missing)
    return SUMS[algorithm](x, g, geometry)


def conv_sum_algorithm(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> str:
    """The name of the algorithm that `conv_weight_sum` takes for the same arguments.

    Returns:
        "plain": torch's own kernel; "product": one product of matrices over the locations of all samples; "formed": each sample's gradient.
    """
    sizes = (*x.shape, *g.shape)
    if functional or must_be_functional(x, g) or x.device.type != "cpu" or not all(type(size) is int for size in sizes) or 0 in sizes:
        return "plain"
    n, b, _, *size = x.shape
    locations, (o, width, *kernel) = b * prod(geometry.locations(size)), geometry.weight_shape(x.shape, g.shape)
    taps = prod(kernel)
    fits = x.dtype.itemsize * n * locations * (x.shape[2] * taps + o) <= current_options().scratch_bytes
    own = conv_algorithm(x, g, geometry)
    if geometry.groups == 1:
        # For one output channel, and for a few input channels of a volume, torch's kernel hardly uses vector instructions.
        if own == "group" and (o == 1 or x.shape[2] >= 4):
            return "formed"
        # Where there are few locations for many weights, what torch's kernel rearranges outweighs the arithmetic.
        return "product" if fits and (2 * n * locations <= o or (taps == 1 and o < 8)) else "plain"
    # Torch's kernel is slow for narrow groups, whose gradients are hardly larger than what they are made of.
    if own == "unfold" and taps > 1 and fits:
        return "product"
    return "formed" if own in ("group", "fold_merged") and width * taps <= 4 * locations else "plain"


def _plain(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    # The operator reads only the shape of the weight.
    weight = g.new_empty(1).expand(geometry.weight_shape(x.shape, g.shape))
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    rest = (False, [0] * len(stride), geometry.groups, (False, True, False))
    grad: Tensor = torch.ops.aten.convolution_backward(g.flatten(0, 1), x.flatten(0, 1), weight, None, stride, padding, dilation, *rest)[1]
    return grad


def _product(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    return unfold(x.flatten(0, 1)[None], g.flatten(0, 1)[None], geometry)[0]


def _formed(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    return conv_weight_grad(x, g, geometry).sum(0)


SUMS: dict[str, Callable[[Tensor, Tensor, ConvGeometry], Tensor]] = {"plain": _plain, "product": _product, "formed": _formed}
