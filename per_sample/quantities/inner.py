"""Inner products of two gradients of each sample."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from per_sample._factors import Factor, Outer, Rows, View
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.gram_norm import finest, product_dtype
from per_sample.quantities.formed import joined, real
from per_sample.quantities.pieces import chosen, sample_pieces
from per_sample.quantities.precision import operands, widened


def inner(a: Factor, b: Factor, *, functional: bool = False) -> Tensor:
    """The real inner product of each sample's gradients of two factors of one shape.

    Args:
        a: some gradients.
        b: others of the same samples.
        functional: use out-of-place differentiable operators only; implied where a derivative, a functorch transform or a trace is under
            way.

    Returns:
        ``[n]``, in float64 on devices that have it.
    """
    functional = functional or must_be_functional(*operands(a), *operands(b))
    if isinstance(a, View) and isinstance(b, View) and a.base.shape == b.base.shape:
        return inner(a.base, b.base, functional=functional)
    if isinstance(a, Outer) and isinstance(b, Rows):
        a, b = b, a
    if isinstance(a, Rows) and isinstance(b, Outer) and not b.like.is_complex():
        return _rows_with_outer(a, b, functional)
    found = []
    for some, grads in sample_pieces(widened(a), functional=functional):
        other = widened(chosen(b, some)).materialize(functional=functional)
        found.append(_dot(real(grads), real(other)))
    return joined(found)


def _rows_with_outer(a: Rows, b: Outer, functional: bool) -> Tensor:
    """Each row with what the product has in its place: ``sum over s, t of left[index_s, t] <g_s, right_t>``."""
    dtype = product_dtype(torch.promote_types(a.g.dtype, b.left.dtype), a.g.device, functional)
    counts = (a.index >= 0).unsqueeze(2)
    places = a.index.clamp_min(0).unsqueeze(2).expand(*a.index.shape, b.left.shape[2])
    left = torch.gather(b.left, 1, places).to(dtype)
    g = a.g.masked_fill(~counts, 0).to(dtype)
    return _dot(left.masked_fill(~counts, 0), g @ b.right.to(dtype).transpose(1, 2))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    size = prod(x.shape[1:])
    return (x.reshape(x.shape[0], size) * y.reshape(y.shape[0], size)).sum(1).to(finest(x.device))
