"""Ops that ask for the values of tensors: a Python number, or a result whose size depends on them."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import Batched, context_of, physical, samples
from per_sample._registry import rule
from per_sample._values import agreed, nonzero

aten = torch.ops.aten


@rule(aten._local_scalar_dense.default)
def local_scalar_dense(self: Any) -> Any:
    what = "`.item()`, `float()`, `int()` or a branch (`if`, `bool()`)"
    integer = not self.dtype.is_floating_point and not self.dtype.is_complex and self.dtype != torch.bool
    return agreed(self.ctx, self.physical, what, number=integer).item()


@rule(aten.is_nonzero.default)
def is_nonzero(self: Any) -> Any:
    return bool(agreed(self.ctx, self.physical != 0, "A branch (`if`, `bool()`)"))


@rule(aten.equal.default)
def equal(self: Any, other: Any) -> Any:
    n = samples(self, other)
    if self.shape != other.shape:
        return False
    same = (physical(self, n) == physical(other, n)).reshape(n, -1).all(1)
    return bool(agreed(context_of(self, other), same, "`torch.equal`"))


@rule(aten.is_same_size.default)
def is_same_size(self: Any, other: Any) -> Any:
    return self.shape == other.shape


@rule(aten._has_same_storage_numel.default)
def has_same_storage_numel(self: Any, other: Any) -> Any:
    """A wrapper has no storage; forward-mode derivatives ask whether a tangent is laid out as its primal."""
    return self.numel() == other.numel()


@rule(aten.allclose.default)
def allclose(self: Any, other: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False) -> Any:
    n = samples(self, other)
    shape = torch.broadcast_shapes(self.shape, other.shape)
    close = torch.isclose(_spread(self, shape, n), _spread(other, shape, n), rtol, atol, equal_nan).reshape(n, -1).all(1)
    return bool(agreed(context_of(self, other), close, "`torch.allclose`"))


@rule(aten.nonzero.default)
def nonzero_rule(self: Any) -> Any:
    return nonzero(self, "`nonzero`")


@rule(aten.masked_select.default)
def masked_select(self: Any, mask: Any) -> Any:
    n = samples(self, mask)
    shape = torch.broadcast_shapes(self.shape, mask.shape)
    value = _spread(self, shape, n)
    if type(mask) is not Batched:
        return value[:, mask.expand(shape)]
    where = _spread(mask, shape, n)
    count = int(agreed(mask.ctx, where.reshape(n, -1).count_nonzero(1), "`masked_select`"))
    return value[where].reshape(n, count)


def _spread(x: Any, shape: Any, n: int) -> Any:
    """``x`` broadcast to ``[n, *shape]``."""
    value = physical(x, n)
    return value.reshape(n, *(1,) * (len(shape) - x.dim()), *x.shape).expand(n, *shape)
