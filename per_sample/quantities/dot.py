"""Inner products of every sample's gradient with one direction that all samples share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.functional import must_be_functional
from per_sample.quantities.pieces import chosen, sample_pieces, wide_dtype
from per_sample.quantities.precision import operands, widened_pieces

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def dot(factor: Factor, direction: Tensor, *, functional: bool = False) -> Tensor:
    """The real part of the sum of ``conj(direction) * g``, for each sample.

    Args:
        factor: the gradients.
        direction: ``[*shape]``.
        functional: use out-of-place differentiable operators only; what is not finite then counts even where a mask leaves it out.

    Returns:
        ``[n]``, real, float32 for half precision.
    """
    direction = direction.to(wide_dtype(factor.like.dtype))
    functional = functional or must_be_functional(*operands(factor), direction)
    found = [_dot(piece, direction, functional) for _, piece in widened_pieces(factor)]
    return torch.cat(found) if len(found) > 1 else found[0]


def _dot(factor: Factor, direction: Tensor, functional: bool) -> Tensor:
    if isinstance(factor, Dense):
        return _real(factor.value.reshape(factor.value.shape[0], direction.numel()) @ direction.conj().reshape(-1))
    if isinstance(factor, Outer):
        return _outer_dot(factor.left, factor.right, direction)
    if isinstance(factor, ConvOuter):
        return _conv_dot(factor, direction)
    if isinstance(factor, Rows):
        dropped = factor.index < 0
        there = direction.index_select(0, factor.index.masked_fill(dropped, 0).flatten()).view(factor.g.shape)
        return _total(factor.g.masked_fill(dropped.unsqueeze(2), 0), there)
    if isinstance(factor, Hadamard):
        return _multiplied_dot(factor, direction, functional)
    if isinstance(factor, View):
        return _dot(factor.base, direction.reshape(factor.base.shape), functional)
    assert isinstance(factor, Sum)
    first, *rest = [_dot(term, direction, functional) for term in factor.terms]
    for other in rest:
        first = first + other
    return first


def _multiplied_dot(factor: Hadamard, direction: Tensor, functional: bool) -> Tensor:
    """The direction is multiplied in the gradients' place."""
    found = _dot(factor.base, Hadamard(factor.base, factor.by.conj()).applied(direction), functional)
    if factor.by.dtype != torch.bool or functional or bool(found.isfinite().all()):
        return found
    # What a mask leaves out must not count, even where it is not finite. The other samples keep what they have.
    spoilt = (~found.isfinite()).nonzero().flatten()
    again = [_dot(Dense(grads), direction, functional) for _, grads in sample_pieces(chosen(factor, spoilt))]
    return found.index_copy(0, spoilt, torch.cat(again).to(found.dtype))


def _outer_dot(left: Tensor, right: Tensor, direction: Tensor) -> Tensor:
    """The direction is multiplied with the larger operand: the product is then of the size of the smaller."""
    if left.shape[-2] > right.shape[-1]:
        left, right, direction = right.mT, left.mT, direction.mT
    # Samples and positions as one axis: matmul would copy the direction for each sample.
    there = right.movedim(0, -3).flatten(-3, -2) @ direction.mH  # (*e, n t, o)
    products = there.unflatten(-2, (left.shape[0], left.shape[-1])) * left.movedim(0, -3).mT
    return _real(products.movedim(-3, 0).flatten(1).sum(1))


def _conv_dot(factor: ConvOuter, direction: Tensor) -> Tensor:
    """The direction as the filters of the convolution."""
    if any(type(size) is int and size == 0 for size in (*factor.x.shape, *factor.g.shape)):
        return _real(factor.g).flatten(1).sum(1)
    out = convolved(factor.x.flatten(0, 1), direction, factor.geometry, factor.g.shape[3:])
    return _total(factor.g, out.reshape(factor.g.shape))


def convolved(x: Tensor, filters: Tensor, geometry: ConvGeometry, locations: Sequence[int]) -> Tensor:
    """A plain convolution, at the first locations alone: a transposed one may leave out the last."""
    rest = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = _CONV[len(geometry.kernel)](x, filters, None, *rest)
    for axis, size in enumerate(locations, start=2):
        out = out.narrow(axis, 0, size)
    return out


def _total(a: Tensor, b: Tensor) -> Tensor:
    """The real part of the sum of ``a * conj(b)`` over each sample, ``[n, ...]``."""
    return _real((a * b.conj()).flatten(1).sum(1))


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
