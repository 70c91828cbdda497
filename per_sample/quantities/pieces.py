"""Gradients a few samples at a time, so that no question needs all of them at once."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._options import current_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What is formed and reduced at once should not leave the cache.
_CACHE_BYTES = 2 * 2**20
_HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: sums and norms are taken there."""
    return x.float() if x.dtype in _HALF else x


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a sum of gradients of this dtype."""
    return torch.float32 if dtype in _HALF else dtype


def count(factor: Factor) -> int:
    """The number of samples."""
    return factor.like.shape[0]


def of_samples(factor: Factor, change: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] = lambda x: x) -> Factor:
    """The factor with each tensor that has a sample axis changed, and those that have none by ``shared``."""
    if isinstance(factor, Dense):
        return Dense(change(factor.value))
    if isinstance(factor, Outer):
        return Outer(change(factor.left), change(factor.right))
    if isinstance(factor, ConvOuter):
        return ConvOuter(change(factor.x), change(factor.g), factor.geometry)
    if isinstance(factor, Rows):
        return Rows(change(factor.index), change(factor.g), factor.num_rows)
    if isinstance(factor, Sum):
        return Sum(tuple(of_samples(term, change, shared) for term in factor.terms))
    if isinstance(factor, Hadamard):
        return Hadamard(of_samples(factor.base, change, shared), shared(factor.by))
    assert isinstance(factor, View)
    return View(of_samples(factor.base, change, shared), factor.shape)


def chosen(factor: Factor, index: Tensor | slice) -> Factor:
    """The same gradients for some of the samples: a slice, or their numbers."""
    return of_samples(factor, lambda x: x[index])


def kept(factor: Factor, keep: Tensor) -> Factor:
    """The same gradients, with zeros for the samples that ``keep [n]`` does not name, whatever they hold."""

    def masked(x: Tensor) -> Tensor:
        return torch.where(keep.reshape(-1, *(1,) * (x.dim() - 1)), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def finite(by: Tensor) -> Tensor:
        # What all samples share may itself not be finite: then none is kept.
        return by if by.dtype == torch.bool else torch.where(keep.any(), by, torch.zeros((), dtype=by.dtype, device=by.device))

    return of_samples(factor, masked, finite)


def sample_pieces(factor: Factor, *, functional: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """All gradients in their turn, ``[m, *shape]`` for the samples of a slice; ``m`` as few as the scratch memory and the cache ask for."""
    n = count(factor)
    if isinstance(factor, Dense) or not all(type(size) is int for size in (n, *factor.shape)):
        # Sizes unknown to a trace must not be compared.
        yield slice(None), factor.materialize(functional=functional)
        return
    size = piece_size(factor)
    if size >= n:
        yield slice(None), factor.materialize(functional=functional)
        return
    for start in range(0, n, size):
        some = slice(start, min(start + size, n))
        yield some, chosen(factor, some).materialize(functional=functional)


def piece_size(factor: Factor) -> int:
    """How many samples' gradients are held at once."""
    like = factor.like
    limit = current_options().scratch_bytes
    if like.device.type == "cpu":
        limit = min(limit, _CACHE_BYTES)
    return max(1, limit // max(1, prod(factor.shape) * like.dtype.itemsize))
