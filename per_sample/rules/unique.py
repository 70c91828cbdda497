"""Distinct values: all samples must have equally many of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched
from per_sample._registry import rule
from per_sample._values import agreed

aten = torch.ops.aten


def _runs(x: Batched, value: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The values ``[n, count]`` of runs of equal elements in ``value [n, t]``, the run of each element, and the lengths of the runs."""
    begins = torch.ones_like(value, dtype=torch.bool)
    begins[:, 1:] = value[:, 1:] != value[:, :-1]
    run = begins.cumsum(1) - 1
    count = int(agreed(x.ctx, begins.sum(1), what))
    lengths = run.new_zeros(x.n, count).scatter_add(1, run, torch.ones_like(run))
    return value[begins].view(x.n, count), run, lengths


@rule(aten.unique_consecutive.default)
def unique_consecutive(self: Any, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None) -> Any:
    if dim is not None:
        return NotImplemented
    values, run, lengths = _runs(self, self.physical.reshape(self.n, -1), "`unique_consecutive`")
    return values, run.view(self.n, *self.shape), lengths


@rule(aten._unique2.default)
def unique(self: Any, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> Any:
    value, order = self.physical.reshape(self.n, -1).sort(1)
    values, run, lengths = _runs(self, value, "`unique`")
    return values, torch.empty_like(run).scatter(1, order, run).view(self.n, *self.shape), lengths
