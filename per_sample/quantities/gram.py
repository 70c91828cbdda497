"""Inner products of all pairs of samples' gradients."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from per_sample._factors import Factor, Outer, Sum
from per_sample._kernels.functional import must_be_functional
from per_sample._options import current_options
from per_sample.quantities.pieces import count
from per_sample.quantities.positions import Positions, conditions, pair_grams, positions
from per_sample.quantities.precision import operands, real_dtype, widened
from per_sample.quantities.rows import ranges, real_elements
from per_sample.quantities.sq_norm import sq_norm

# What is multiplied at once should not leave the cache.
_CACHE_BYTES = 4 * 2**20
# The share of the sum of its parts' norms below which a float64 gradient is not to be judged by products of its parts.
_CANCELLED = 1e-3

Terms = list[Positions]


def gram(a: Factor, b: Factor, *, functional: bool = False) -> Tensor:
    """The real inner product of every gradient of ``a`` with every one of ``b``, of the same leaf.

    Args:
        a: the gradients of n samples.
        b: those of m samples, which may have other numbers of positions; or ``a`` itself: then the result is symmetric.
        functional: use out-of-place differentiable operators only.

    Returns:
        ``[n, m]``, real, float32 for half precision.
    """
    same = a is b
    a = _merged(a)
    b = a if same else _merged(b)
    dtype = real_dtype(a.like.dtype)
    terms = _pairs(a, b, functional)
    if terms is None:
        found = _by_rows(widened(a), None if same else widened(b), functional)
    else:
        found = _by_positions(terms[0], None if same else terms[1])
    found = found.to(dtype)
    if not same:
        return found
    norms = sq_norm(a, functional=functional).to(dtype)
    return found.triu(1) + found.triu(1).mT + norms.diag()


def gram_algorithm(a: Factor, b: Factor, *, functional: bool = False) -> str:
    """The name of the way that `gram` takes: by pairs of "positions", or by "rows" of the leaf for all samples."""
    return "rows" if _pairs(_merged(a), _merged(b), functional) is None else "positions"


def _merged(factor: Factor) -> Factor:
    """The products of a sum as one, with their positions side by side."""
    if not isinstance(factor, Sum):
        return factor
    products = [term for term in factor.terms if isinstance(term, Outer)]
    if len(products) < 2:
        return factor
    one = Outer(torch.cat([p.left for p in products], -1), torch.cat([p.right for p in products], -2))
    rest = [term for term in factor.terms if not isinstance(term, Outer)]
    return Sum((one, *rest)) if rest else one


def _pairs(a: Factor, b: Factor, functional: bool) -> tuple[Terms, Terms] | None:
    """Both in positions, where it is cheaper to multiply those pair by pair, and right."""
    if a.like.device.type == "mps":
        return None  # no float64
    ours, theirs = positions(a), positions(b)
    if ours is None or theirs is None or ours[0].matrix != theirs[0].matrix:
        return None
    sizes = [size for term in ours + theirs for size in (*term.left.shape, *term.matrix)]
    if not all(type(size) is int for size in sizes):
        # Sizes unknown to a trace must not be compared.
        return (ours, theirs) if _single(ours) and _single(theirs) else None
    if 0 in sizes:
        return None
    if _positions_cost(ours, theirs, a.like.dtype) > _rows_cost(ours, theirs):
        return None
    return None if _cancels(a, ours, functional) or (b is not a and _cancels(b, theirs, functional)) else (ours, theirs)


def _single(terms: Terms) -> bool:
    return len(terms) == 1 and type(terms[0].number) is int and terms[0].number == 1


def _positions_cost(ours: Terms, theirs: Terms, dtype: torch.dtype) -> float:
    (o, i), total = ours[0].matrix, 0
    for a in ours:
        for b in theirs:
            left = 8 if a.indexed or b.indexed else o
            total += a.left.shape[0] * b.left.shape[0] * a.number * b.number * (left + i + 8)
    # In float64.
    return total * (1 if dtype in (torch.float64, torch.complex128) else 2)


def _rows_cost(ours: Terms, theirs: Terms) -> float:
    o, i = ours[0].matrix
    n, m = ours[0].left.shape[0], theirs[0].left.shape[0]
    formed = sum(term.left.shape[0] * (8 if term.indexed else term.number * o) * i for term in ours + theirs)
    return formed + (8 * (n + m) + n * m) * o * i


def _cancels(factor: Factor, terms: Terms, functional: bool) -> bool:
    """Whether gradients are so much smaller than the sum of their parts that float64 products of float64 parts are not good enough."""
    if factor.like.dtype not in (torch.float64, torch.complex128) or _single(terms) or functional or must_be_functional(*operands(factor)):
        return False
    return bool((sq_norm(factor).sqrt() < _CANCELLED * conditions(terms)).any())


def _by_positions(ours: Terms, theirs: Terms | None) -> Tensor:
    """Blocks of pairs of samples; of a symmetric result those on and above the diagonal."""
    others = ours if theirs is None else theirs
    n, m = ours[0].left.shape[0], others[0].left.shape[0]
    if type(n) is not int or type(m) is not int:
        return _block_gram([term.piece(0, n) for term in ours], [term.piece(0, m) for term in others])
    nb, mb = _block(ours, others, n, m)
    if theirs is None:
        nb = mb = min(nb, mb)
    rows = []
    for start in range(0, n, nb):
        own = [term.piece(start, start + nb) for term in ours]
        first = start if theirs is None else 0
        blocks = []
        for other in range(first, m, mb):
            there = own if theirs is None and other == start else [term.piece(other, other + mb) for term in others]
            blocks.append(_block_gram(own, there))
        row = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
        rows.append(torch.nn.functional.pad(row, (first, 0)) if first else row)
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _block_gram(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> Tensor:
    first, *rest = [pair_grams(a, b) for a in ours for b in theirs]
    for other in rest:
        first = first + other
    return first


def _block(ours: Terms, theirs: Terms, n: int, m: int) -> tuple[int, int]:
    """How many samples of each side are multiplied at once."""
    like = ours[0].left
    limit = current_options().scratch_bytes
    if like.device.type == "cpu":
        limit = min(limit, _CACHE_BYTES)
    pairs = max(1, limit // (16 * max(1, sum(a.number for a in ours) * sum(b.number for b in theirs))))
    mb = max(1, min(m, isqrt(pairs)))
    return max(1, min(n, pairs // mb)), mb


def _by_rows(a: Factor, b: Factor | None, functional: bool) -> Tensor:
    """A range of the leaf at a time, for all samples."""
    like = a.like
    n, m = count(a), count(a if b is None else b)
    found = like.new_zeros((n, m), dtype=real_dtype(like.dtype))
    for start, size in ranges(a, (n + (0 if b is None else m)) * like.dtype.itemsize):
        left = real_elements(a, start, size, functional=functional)
        right = left if b is None else real_elements(b, start, size, functional=functional)
        found = found + left @ right.mT
    return found
