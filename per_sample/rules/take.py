"""`take` and `put`, which number the elements of a whole sample, and `index_reduce`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._combinators import axis
from per_sample._registry import rule

aten = torch.ops.aten


def _flat(x: Any, n: int) -> Tensor:
    return physical(x, n).reshape(n, x.numel())


def _positions(index: Any, count: int, n: int) -> Tensor:
    """The element numbers ``[n, k]``; negative ones count from the end, and none reaches another sample."""
    flat = _flat(index, n)
    return torch.where(flat < 0, flat + count, flat)


@rule(aten.take.default)
def take(self: Any, index: Any) -> Any:
    n = samples(self, index)
    return _flat(self, n).gather(1, _positions(index, self.numel(), n)).view(n, *index.shape)


@rule(aten.put.default)
def put(self: Any, index: Any, source: Any, accumulate: bool = False) -> Any:
    n = samples(self, index, source)
    value, where, given = _flat(self, n), _positions(index, self.numel(), n), _flat(source, n)
    out = value.scatter_add(1, where, given) if accumulate else value.scatter(1, where, given)
    return out.view(n, *self.shape)


@rule(aten.index_reduce.default)
def index_reduce(self: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True) -> Any:
    if self.dim() == 0 or source.dim() != self.dim():
        return NotImplemented
    n = samples(self, index, source)
    value, given, at = physical(self, n), physical(source, n), axis(dim, self.dim())
    if type(index) is not Batched:
        return torch.index_reduce(value, at, index, given, reduce, include_self=include_self)
    where = _flat(index, n).reshape(n, *(1,) * (at - 1), -1, *(1,) * (self.dim() - at)).expand(given.shape)
    return torch.scatter_reduce(value, at, where, given, reduce, include_self=include_self)
