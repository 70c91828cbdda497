"""Random projections of every sample's gradient to few numbers."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Factor, Outer, Rows, Sum, View
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._options import current_options
from per_sample.quantities.dot import convolved
from per_sample.quantities.pieces import count, wide_dtype
from per_sample.quantities.precision import real_dtype, widened, widened_pieces
from per_sample.quantities.projectors import FactoredProjector, Projector, SparseProjector
from per_sample.quantities.rows import ranges, real_elements


def project(factor: Factor, projector: Projector, leaf: int, *, functional: bool = False) -> Tensor:
    """The projector's matrix for a leaf times each sample's flattened gradient.

    Complex gradients are projected as pairs of real numbers.

    Args:
        factor: the gradients.
        projector: tells the matrix.
        leaf: the leaf's number among the differentiated tensors.
        functional: use out-of-place differentiable operators only.

    Returns:
        ``[n, k]``, real, float32 for half precision.
    """
    like = factor.like
    if isinstance(projector, FactoredProjector) and len(factor.shape) >= 2 and 0 not in factor.shape and not like.is_complex():
        sides = projector.sides(factor.shape, leaf, wide_dtype(like.dtype), like.device)
        found = [_by_sides(piece, *sides, functional).flatten(1) for _, piece in widened_pieces(factor)]
        return torch.cat(found) if len(found) > 1 else found[0]
    factor = widened(factor)
    base = factor
    while isinstance(base, View):
        base = base.base
    if isinstance(base, Rows) and not like.is_complex() and not isinstance(projector, SparseProjector) and _few(base):
        return _by_rows(base, projector, leaf)
    return _by_elements(factor, projector, leaf, functional)


def _few(factor: Rows) -> bool:
    """Whether the samples have fewer rows than the leaf."""
    sizes = (*factor.index.shape, factor.num_rows)
    return all(type(size) is int for size in sizes) and factor.index.numel() < factor.num_rows


def _by_rows(factor: Rows, projector: Projector, leaf: int) -> Tensor:
    """Only the columns for the rows that the samples have."""
    n, t, width = factor.g.shape
    dropped = factor.index < 0
    index, g = factor.index.masked_fill(dropped, 0).flatten(), factor.g.masked_fill(dropped.unsqueeze(2), 0).flatten(0, 1)
    inside = torch.arange(width, device=g.device)
    step = max(1, current_options().scratch_bytes // (32 * projector.k * max(1, width)))
    found = []
    for rows, value in zip(index.split(step), g.split(step), strict=True):
        columns = projector.entries(leaf, rows.unsqueeze(1) * width + inside, g.dtype)  # (k, rows, width)
        found.append((columns.movedim(0, 1) @ value.unsqueeze(2)).squeeze(2))
    return torch.cat(found).view(n, t, projector.k).sum(1)


def _by_elements(factor: Factor, projector: Projector, leaf: int, functional: bool) -> Tensor:
    """A range of the leaf at a time, for all samples."""
    like, n = factor.like, count(factor)
    parts = 2 if like.is_complex() else 1
    shape = (*factor.shape, 2) if parts == 2 else factor.shape
    dtype = real_dtype(like.dtype)
    found = like.new_zeros((n, projector.k), dtype=dtype)
    for start, size in ranges(factor, n * like.dtype.itemsize):
        value = real_elements(factor, start, size, functional=functional)
        if isinstance(projector, SparseProjector):
            found = _scattered(found, value, projector, leaf, parts * start)
            continue
        # A random number passes through a few of 8 bytes.
        step = max(1, current_options().scratch_bytes // (32 * projector.k))
        for inner, some in enumerate(value.split(step, 1) if type(size) is int else (value,)):
            columns = projector.matrix(shape, leaf, parts * start + inner * step, some.shape[1], dtype=dtype, device=like.device)
            found = found + some @ columns.mT
    return found


def _scattered(found: Tensor, value: Tensor, projector: SparseProjector, leaf: int, start: int) -> Tensor:
    """Every element to its few places, without a matrix."""
    places = torch.arange(start, start + value.shape[1], device=value.device)
    targets, signs = projector.targets(leaf, places, value.dtype)
    for target, sign in zip(targets, signs, strict=True):
        found = found.index_add(1, target, value * sign)
    return found


def _by_sides(factor: Factor, a: Tensor, b: Tensor, functional: bool) -> Tensor:
    """The gradients as matrices between ``a [left, o]`` and the transpose of ``b [right, i]``: ``[n, left, right]``."""
    if isinstance(factor, Sum):
        first, *rest = [_by_sides(term, a, b, functional) for term in factor.terms]
        for other in rest:
            first = first + other
        return first
    if isinstance(factor, View) and len(factor.base.shape) >= 2 and factor.base.shape[0] == factor.shape[0]:
        return _by_sides(factor.base, a, b, functional)
    if isinstance(factor, Outer) and factor.left.dim() == 3:
        return (a @ factor.left) @ (factor.right @ b.mT)
    if isinstance(factor, Rows):
        dropped = factor.index < 0
        left = a.mT[factor.index.masked_fill(dropped, 0)]  # (n, t, left)
        return left.mT @ (factor.g.masked_fill(dropped.unsqueeze(2), 0) @ b.mT)
    if isinstance(factor, ConvOuter):
        return _conv_by_sides(factor, a, b)
    found, width = a.new_zeros((count(factor), a.shape[0], b.shape[0])), b.shape[1]
    for start, size in ranges(factor, count(factor) * a.dtype.itemsize, width):
        rows = real_elements(factor, start, size, functional=functional).unflatten(1, (-1, width))
        there = a.narrow(1, start // width, size // width)
        found = found + there @ (rows @ b.mT)
    return found


def _conv_by_sides(factor: ConvOuter, a: Tensor, b: Tensor) -> Tensor:
    """``b`` as filters for the input of each group, ``a`` applied to the output's gradient."""
    geometry, x, g = factor.geometry, factor.x, factor.g
    groups, (n, batch) = geometry.groups, x.shape[:2]
    if any(type(size) is int and size == 0 for size in (*x.shape, *g.shape)):
        return a.new_zeros((n, a.shape[0], b.shape[0]))
    one = ConvGeometry(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, 1)
    x = x.unflatten(2, (groups, -1)).flatten(0, 2)
    out = convolved(x, b.unflatten(1, (x.shape[1], *geometry.kernel)), one, g.shape[3:])
    out = out.reshape(n, batch, groups, b.shape[0], prod(g.shape[3:])).permute(0, 2, 3, 1, 4).flatten(3)  # (n, group, right, b l)
    g = g.unflatten(2, (groups, -1)).movedim(1, 3).flatten(4).flatten(3, 4)  # (n, group, o, b l)
    left = a.unflatten(1, (groups, -1)).movedim(1, 0) @ g  # (n, group, left, b l)
    return (left @ out.mT).sum(1)
