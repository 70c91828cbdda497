"""Rows added up at indices, for each sample: the gradient of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import zeros


def scatter_rows(index: Tensor, g: Tensor, num_rows: int, *, functional: bool = False) -> Tensor:
    """For each sample a matrix whose row ``index[n, t]`` is the sum of the ``g[n, t]`` that go there.

    Args:
        index: ``(n, t)``; a negative one drops its row.
        g: ``(n, t, i)``.
        num_rows: of the result; every index is below it.
        functional: use out-of-place differentiable operators only.

    Returns:
        ``(n, num_rows, i)``.
    """
    n, t, width = g.shape
    kept = index >= 0
    start = torch.arange(n, device=index.device)[:, None] * num_rows
    # A dropped row adds zeros to row 0 of its own sample.
    row = (torch.where(kept, index, 0) + start).reshape(n * t)
    values = torch.where(kept.unsqueeze(2), g, 0).reshape(n * t, width)
    if functional or must_be_functional(index, g):
        return g.new_zeros(n * num_rows, width).index_add(0, row, values).view(n, num_rows, width)
    return zeros((n * num_rows, width), like=g).index_add_(0, row, values).view(n, num_rows, width)
