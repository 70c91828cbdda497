"""`masked_scatter`: the elements of one tensor, in order, to the places that a mask marks in another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from per_sample._batched import physical, samples
from per_sample._registry import rule

aten = torch.ops.aten


def _flat(x: Any, shape: Any, n: int) -> Tensor:
    """``x`` broadcast to ``shape``, ``[n, elements]``."""
    value = physical(x, n)
    return value.reshape(n, *(1,) * (len(shape) - x.dim()), *x.shape).expand(n, *shape).reshape(n, math.prod(shape))


def _sources(mask: Tensor) -> Tensor:
    """For each place of ``mask [n, elements]`` the number of the element that goes there; 0 where none does."""
    return (mask.cumsum(1) - 1).where(mask, 0)


@rule(aten.masked_scatter.default)
def masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    if source.numel() == 0:
        return NotImplemented
    n = samples(self, mask, source)
    shape = torch.broadcast_shapes(self.shape, mask.shape)
    where = _flat(mask, shape, n)
    elements = physical(source, n).reshape(n, -1)
    return torch.where(where, elements.gather(1, _sources(where)), _flat(self, shape, n)).view(n, *shape)


@rule(aten.masked_scatter_backward.default)
def masked_scatter_backward(grad_output: Any, mask: Any, sizes: Any) -> Any:
    n = samples(grad_output, mask)
    where = _flat(mask, grad_output.shape, n)
    if math.prod(sizes) == 0:
        return NotImplemented
    grad = _flat(grad_output, grad_output.shape, n)
    zeros = grad.new_zeros(n, math.prod(sizes))
    return zeros.scatter_add(1, _sources(where), grad.where(where, 0)).view(n, *sizes)
