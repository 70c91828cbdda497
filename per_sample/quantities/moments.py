"""Means, squares and deviations of the samples' gradients, element by element."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from per_sample._factors import Dense, Factor, Hadamard, Outer, Rows, View
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.rows import coalesced
from per_sample.quantities.pieces import count, piece_size, sample_pieces, wide_dtype
from per_sample.quantities.precision import doubled, operands, real_dtype, widened, widened_pieces
from per_sample.quantities.weighted_sum import weighted_sum

Moments = tuple[Tensor, Tensor]

# The share of the sum of squares below which a sum of squared deviations has lost too many of float64's digits, for a result of a dtype.
_LOST = {torch.float32: 1e-8, torch.float64: 1e-3}


def square_sum(factor: Factor, *, functional: bool = False) -> Tensor:
    """The sum of ``|g|**2`` over the samples, ``[*shape]``, real, float32 or wider."""
    if isinstance(factor, View):
        return square_sum(factor.base, functional=functional).reshape(factor.shape)
    if isinstance(factor, Hadamard) and factor.by.dtype == torch.bool:
        return factor.applied(square_sum(factor.base, functional=functional))
    if _factorises(factor):
        return _outer_square_sum(factor).to(real_dtype(factor.like.dtype))
    if isinstance(factor, Rows):
        index, g = _coalesced(factor)
        return weighted_sum(Rows(index, squares(g), factor.num_rows), None)
    total: Tensor | None = None
    for grads in _wide_pieces(factor, functional):
        found = squares(grads).sum(0)
        total = found if total is None else total + found
    assert total is not None
    return total


def moments(factor: Factor, *, functional: bool = False) -> Moments:
    """The mean of the gradients and the sum of the squares of their deviations from it, both ``[*shape]``, float32 or wider.

    Both are zeros where there are no samples.
    """
    if isinstance(factor, View):
        mean, deviations = moments(factor.base, functional=functional)
        return mean.reshape(factor.shape), deviations.reshape(factor.shape)
    if isinstance(factor, Hadamard) and factor.by.dtype == torch.bool:
        mean, deviations = moments(factor.base, functional=functional)
        return factor.applied(mean), factor.applied(deviations)
    n = count(factor)
    if type(n) is int and n == 0:
        zeros = torch.zeros(factor.shape, dtype=wide_dtype(factor.like.dtype), device=factor.like.device)
        return zeros, zeros.real.clone()
    if isinstance(factor, Rows):
        return _row_moments(factor, n)
    if _factorises(factor) and not (functional or must_be_functional(*operands(factor))):
        found = _outer_moments(factor, n)
        if found is not None:
            return found
    return _two_passes(factor, n, functional)


def merged(a: Moments, count_a: int, b: Moments, count_b: int) -> Moments:
    """The `moments` of two sets of samples together, from each one's and how many samples it has (Chan, Golub and LeVeque 1979)."""
    if type(count_a) is int and type(count_b) is int and count_a + count_b == 0:
        return a
    share = count_b / (count_a + count_b)
    apart = b[0] - a[0]
    return a[0] + apart * share, a[1] + b[1] + squares(apart) * (count_a * share)


def squares(x: Tensor) -> Tensor:
    """The squares of the absolute values."""
    return x.real.square() + x.imag.square() if x.is_complex() else x.square()


def _two_passes(factor: Factor, n: int, functional: bool) -> Moments:
    """The deviations from a mean found before; what that one is wrong by shows as their sum."""
    about = weighted_sum(factor, None, functional=functional) / n
    found: list[Tensor] = []
    for grads in _wide_pieces(factor, functional):
        apart = grads - about
        new = apart.sum(0), squares(apart).sum(0)
        found = [old + more for old, more in zip(found, new, strict=True)] if found else list(new)
    off, deviations = found
    return about + off / n, (deviations - squares(off) / n).clamp(min=0)


def _wide_pieces(factor: Factor, functional: bool) -> Iterator[Tensor]:
    """The gradients, float32 or wider, some samples at a time."""
    if isinstance(factor, Dense) and type(factor.value.shape[0]) is int and factor.value.shape[0] > 0:
        for value in factor.value.split(piece_size(factor)):
            yield widened(Dense(value)).materialize()
        return
    for _, piece in widened_pieces(factor):
        for _, grads in sample_pieces(piece, functional=functional):
            yield grads


def _factorises(factor: Factor) -> bool:
    """Whether each gradient is a column times a row, whose squares are the columns' times the rows'."""
    return isinstance(factor, Outer) and factor.left.shape[-1] == 1 and factor.left.device.type != "mps"


def _outer_square_sum(factor: Factor) -> Tensor:
    """In float64, where no square of a float32 number overflows."""
    assert isinstance(factor, Outer)
    return weighted_sum(Outer(squares(doubled(factor.left)), squares(doubled(factor.right))), None)


def _outer_moments(factor: Factor, n: int) -> Moments | None:
    """From the sums of the gradients and of their squares, in float64; None where they are nearly equal."""
    assert isinstance(factor, Outer)
    dtype = wide_dtype(factor.like.dtype)
    mean = weighted_sum(Outer(doubled(factor.left), doubled(factor.right)), None) / n
    total = _outer_square_sum(factor)
    deviations = total - n * squares(mean)
    if bool((deviations < _LOST[real_dtype(dtype)] * total).any()):
        return None
    return mean.to(dtype), deviations.to(real_dtype(dtype))


def _row_moments(factor: Rows, n: int) -> Moments:
    """The rows that a sample does not use deviate by the mean itself."""
    mean = weighted_sum(factor, None) / n
    index, g = _coalesced(factor)
    there = index >= 0
    used = weighted_sum(Rows(index, there.unsqueeze(2).to(real_dtype(mean.dtype)), factor.num_rows), None)
    apart = g - mean.index_select(0, index.clamp(min=0).flatten()).view(g.shape)
    deviations = weighted_sum(Rows(index, squares(apart), factor.num_rows), None)
    return mean, deviations + (n - used) * squares(mean)


def _coalesced(factor: Rows) -> tuple[Tensor, Tensor]:
    wide_rows = widened(factor)
    assert isinstance(wide_rows, Rows)
    return coalesced(wide_rows.index, wide_rows.g)
