"""Weighted sums over the samples, without any sample's own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View, scaled
from per_sample._kernels.conv_sum import conv_sum_algorithm, conv_weight_sum
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.onednn import fast_mm, inner_product
from per_sample.quantities.precision import operands, real_dtype, widened_pieces


def weighted_sum(factor: Factor, weights: Tensor | None, *, functional: bool = False) -> Tensor:
    """The sum of each sample's gradient times its weight, ``[*shape]``, in float32 or wider.

    Args:
        factor: the gradients.
        weights: ``[n]``, or None: the plain sum. A weight of 0 does not drop a gradient that is not finite.
        functional: use out-of-place differentiable operators only.

    Returns:
        ``[*shape]``, float32 for half precision.
    """
    functional = functional or must_be_functional(*operands(factor), *(() if weights is None else (weights,)))
    if weights is not None:
        weights = weights.to(real_dtype(factor.like.dtype))
    total: Tensor | None = None
    for some, piece in widened_pieces(factor):
        found = _sum(piece, None if weights is None else weights[some], functional)
        total = found if total is None else total + found
    assert total is not None
    return total


def sum_algorithm(factor: Factor, *, functional: bool = False) -> str:
    """The name of the way that `weighted_sum` takes for the same gradients, for `explain`.

    "product" is one product of matrices over all samples, "sum" adds up gradients that are formed, "rows" adds rows where they belong; of
    a convolution see `conv_sum_algorithm`. A parameter that is used in different ways has "terms".
    """
    if isinstance(factor, View | Hadamard):
        return sum_algorithm(factor.base, functional=functional)
    if isinstance(factor, Sum):
        kinds = {sum_algorithm(term, functional=functional) for term in factor.terms}
        return kinds.pop() if len(kinds) == 1 else "terms"
    if isinstance(factor, ConvOuter) and not factor.x.is_complex():
        return conv_sum_algorithm(factor.x, factor.g, factor.geometry, functional=functional)
    return {Dense: "sum", Outer: "product", Rows: "rows", ConvOuter: "plain"}[type(factor)]


def _sum(factor: Factor, weights: Tensor | None, functional: bool) -> Tensor:
    if isinstance(factor, Sum):
        return _sum_of_terms(factor, weights, functional)
    if isinstance(factor, Hadamard):
        return factor.applied(_sum(factor.base, weights, functional))
    if isinstance(factor, View):
        return _sum(factor.base, weights, functional).reshape(factor.shape)
    if isinstance(factor, Dense):
        return _dense_sum(factor.value, weights)
    if weights is not None:
        factor = _weighted(factor, weights)
    if isinstance(factor, Outer):
        return _outer_sum([factor], functional)
    if isinstance(factor, ConvOuter):
        return _conv_sum(factor, functional)
    assert isinstance(factor, Rows)
    return _rows_sum(factor, functional)


def _weighted(factor: Factor, weights: Tensor) -> Factor:
    """The factor with its smaller operand scaled."""
    if isinstance(factor, ConvOuter) and factor.x.numel() < factor.g.numel():
        return ConvOuter(scaled(factor.x, weights), factor.g, factor.geometry)
    return factor.scale(weights)


def _dense_sum(value: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return value.sum(0)
    return (weights.to(value.dtype) @ value.reshape(value.shape[0], prod(value.shape[1:]))).reshape(value.shape[1:])


def _sum_of_terms(factor: Sum, weights: Tensor | None, functional: bool) -> Tensor:
    """Products side by side where they are smaller than their sum, such as those of a recurrent weight."""
    products = [term for term in factor.terms if isinstance(term, Outer)]
    together = len(products) > 1 and sum(p.left.numel() + p.right.numel() for p in products) <= len(products) * prod(factor.shape)
    found = [_sum(term, weights, functional) for term in factor.terms if not (together and isinstance(term, Outer))]
    if together:
        found.append(_outer_sum([p if weights is None else p.scale(weights) for p in products], functional))
    total, *rest = found
    for other in rest:
        total = total + other
    return total


def _outer_sum(products: Sequence[Factor], functional: bool) -> Tensor:
    """Samples and positions are one axis, over which one product of matrices sums."""
    lefts = [p.left.movedim(0, -2).flatten(-2) for p in products if isinstance(p, Outer)]
    rights = [p.right.movedim(0, -3).flatten(-3, -2) for p in products if isinstance(p, Outer)]
    left = torch.cat(lefts, -1) if len(lefts) > 1 else lefts[0]
    right = torch.cat(rights, -2) if len(rights) > 1 else rights[0]
    if not functional and _onednn_pays(left, right):
        return inner_product(left, right.mT)
    return left @ right


def _onednn_pays(left: Tensor, right: Tensor) -> bool:
    """oneDNN takes its operands in row-major strides: what it gains must outweigh two transpositions."""
    if left.dim() != 2 or left.dtype != torch.float32 or right.dtype != torch.float32 or left.device.type != "cpu":
        return False
    (o, t), i = left.shape, right.shape[1]
    return min(o, i) >= 256 and o * t * i >= 2**26 and not fast_mm()


def _rows_sum(factor: Rows, functional: bool) -> Tensor:
    dropped, index, g = factor.index < 0, factor.index, factor.g
    if functional or bool(dropped.any()):
        index, g = index.masked_fill(dropped, 0), g.masked_fill(dropped.unsqueeze(2), 0)
    index, g = index.flatten(), g.flatten(0, 1)
    zeros = g.new_zeros(factor.shape)
    return zeros.index_add(0, index, g) if functional else zeros.index_add_(0, index, g)


def _conv_sum(factor: ConvOuter, functional: bool) -> Tensor:
    """One weight gradient over all samples."""
    x, g, geometry = factor.x, factor.g, factor.geometry
    if any(type(size) is int and size == 0 for size in (*x.shape, *g.shape)):
        return x.new_zeros(factor.shape)
    if not x.is_complex():
        return conv_weight_sum(x, g, geometry, functional=functional)
    # g conj(x), in real numbers: the two parts of `x` as one batch.
    (xr, xi), (gr, gi) = (torch.view_as_real(p.resolve_conj()).unbind(-1) for p in (x, g))
    x = torch.cat((xr, xi))
    parts = torch.cat((gr, gi)), torch.cat((gi, -gr))
    return torch.complex(*(conv_weight_sum(x, part, geometry, functional=functional) for part in parts))
