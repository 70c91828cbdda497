"""Rows added up at indices, for each sample: the gradient of an embedding."""

from __future__ import annotations

from torch import Tensor

from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import empty


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
