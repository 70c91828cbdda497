"""The numbers of every sample's gradient, a few samples at a time, for questions that do not care where in the gradient they stand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from per_sample._factors import Dense, Factor, Rows, View
from per_sample._kernels.rows import coalesced
from per_sample.quantities.pieces import chosen, count, piece_size, wide
from per_sample.quantities.precision import widened


def formed_pieces(factor: Factor, *, functional: bool) -> Iterator[Tensor]:
    """The gradients of some samples after those of others, ``[m, ...]``, float32 or wider; of rows only those that receive something.

    Args:
        factor: the gradients.
        functional: use out-of-place differentiable operators only.
    """
    n, like = count(factor), factor.like
    step = n
    if all(type(size) is int for size in (n, *factor.shape)):
        step = max(1, held_at_once(factor) * like.dtype.itemsize // wide(like[:0]).dtype.itemsize)
    if step is n or step >= n:
        yield _formed(widened(factor), functional)
        return
    for start in range(0, n, step):
        yield _formed(widened(chosen(factor, slice(start, start + step))), functional)


def _formed(factor: Factor, functional: bool) -> Tensor:
    if isinstance(factor, View):
        return _formed(factor.base, functional)
    if isinstance(factor, Rows) and compact(factor):
        return coalesced(factor.index, factor.g)[1]
    return factor.materialize(functional=functional)


def compact(factor: Rows) -> bool:
    """Whether there are fewer rows to add up than places for them."""
    positions = factor.index.shape[1]
    return type(positions) is int and positions < factor.num_rows


def held_at_once(factor: Factor) -> int:
    """How many samples' gradients are formed at once."""
    if isinstance(factor, View):
        return held_at_once(factor.base)
    if isinstance(factor, Rows) and compact(factor):
        # The rows, their copy without those that count for nothing, and where each element goes.
        return max(1, piece_size(Dense(factor.g)) // 4)
    return piece_size(factor)


def joined(found: list[Tensor]) -> Tensor:
    """What was found for some samples after what was found for others."""
    return torch.cat(found) if len(found) > 1 else found[0]


def real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
