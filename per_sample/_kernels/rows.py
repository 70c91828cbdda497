"""Rows added up at indices, for each sample: the gradient of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import empty
from per_sample._kernels.squares import square_sums


def scatter_rows(index: Tensor, g: Tensor, num_rows: int, *, functional: bool = False) -> Tensor:
    """For each sample a matrix whose row ``index[n, t]`` is the sum of the ``g[n, t]`` that go there.

    Args:
        index: ``(n, t)``.
        g: ``(n, t, i)``.
        num_rows: of the result.
        functional: use out-of-place differentiable operators only.

    Returns:
        ``(n, num_rows, i)``.

    Raises:
        RuntimeError: an index is not in ``[0, num_rows)``.
    """
    # Along an axis of its own: an index out of range raises, it cannot reach another sample's rows.
    rows = index.unsqueeze(2).expand(g.shape)
    shape = (g.shape[0], num_rows, g.shape[2])
    if functional or must_be_functional(index, g):
        return g.new_zeros(shape).scatter_add(1, rows, g)
    return empty(shape, like=g).zero_().scatter_add_(1, rows, g)


def coalesced(index: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each sample that go to the same place added up, without the matrix they go to.

    Args:
        index: where each row goes, `(n, t)`; one that goes to a place below 0 counts for nothing.
        g: the rows, `(n, t, i)`.

    Returns:
        An index `(n, t)` of which no two of a sample are equal, -1 for the rows that are left over, and rows `(n, t, i)`.
    """
    g = g.masked_fill((index < 0).unsqueeze(2), 0)
    index, order = index.sort(1)
    place = torch.cat((torch.zeros_like(index[:, :1]), (index[:, 1:] != index[:, :-1]).to(index.dtype)), 1).cumsum(1)
    # A row keeps its place in memory and only learns where it goes.
    target = torch.zeros_like(place).scatter(1, order, place)
    rows = torch.zeros_like(g).scatter_add(1, target.unsqueeze(2).expand(g.shape), g)
    return torch.full_like(index, -1).scatter(1, place, index.clamp(min=-1)), rows


def rows_sq_norm(index: Tensor, g: Tensor) -> Tensor:
    """The squared norms of the matrices that the rows of each sample add up to, `(n)` in float64; only equal places are added up.

    Args:
        index: where each row goes, `(n, t)`; one that goes to a place below 0 counts for nothing.
        g: the rows, `(n, t, i)`, float32 or wider.
    """
    own = _squares(g).masked_fill(index < 0, 0)
    places, order = index.sort(1)
    again = torch.zeros_like(places, dtype=torch.bool)
    again[:, 1:] = (places[:, 1:] == places[:, :-1]) & (places[:, 1:] >= 0)
    if not bool(again.any()):
        return own.sum(1)
    shared = again.clone()
    shared[:, :-1] |= again[:, 1:]
    total = own.masked_fill(torch.zeros_like(shared).scatter(1, order, shared), 0).sum(1)
    sample, position = shared.nonzero().unbind(1)
    first = ~again[sample, position]
    rows = g[sample, order[sample, position]]
    sums = rows.new_zeros(int(first.sum()), g.shape[2]).index_add_(0, first.cumsum(0) - 1, rows)
    return total.index_add_(0, sample[first], _squares(sums))


def _squares(rows: Tensor) -> Tensor:
    return square_sums(rows.flatten(0, -2)).view(rows.shape[:-1])
