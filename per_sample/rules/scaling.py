"""Pointwise ops that keep a gradient factored: scaling, masks, sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample import _factors
from per_sample._batched import Batched
from per_sample._combinators import at_rank, is_inexact
from per_sample._factors import Factor, Hadamard, Outer
from per_sample._kernels.functional import must_be_functional
from per_sample._pointwise import pointwise
from per_sample._registry import rule

aten = torch.ops.aten

_mul = pointwise(aten.mul.Tensor)
_div = pointwise(aten.div.Tensor)
_add = pointwise(aten.add.Tensor)
_neg = pointwise(aten.neg.default)
_where = pointwise(aten.where.self)
_masked_fill_scalar = pointwise(aten.masked_fill.Scalar)


def _is_scale(x: Any, of: Tensor) -> bool:
    """Whether ``x`` is one number that all samples share and that keeps the dtype of ``of``.

    In half precision a scaled operand could leave the range that the product keeps.
    """
    if of.dtype in (torch.float16, torch.bfloat16):
        return False
    if isinstance(x, Tensor):
        return type(x) is not Batched and x.dim() == 0 and x.is_complex() <= of.is_complex() and x.device == of.device
    return (isinstance(x, (int, float)) or of.is_complex()) and abs(x) < 1e30


def _multiplied(x: Any, by: Any) -> Factor | None:
    """A factored gradient times a tensor, as a factor where one can express it; None where not."""
    # Looked at first: to ask for the numbers of the other may settle this one.
    factor = x.factor if type(x) is Batched else None
    if factor is None or not isinstance(by, Tensor) or not _fits(by, x):
        return None
    if x.dtype in (torch.float16, torch.bfloat16) or torch.promote_types(x.dtype, by.dtype) != x.dtype:
        return None
    own = at_rank(by, x.dim()) if type(by) is Batched else by.reshape(*(1,) * (x.dim() + 1 - by.dim()), *by.shape)
    return _factors.multiplied(factor, own.to(x.dtype))


def _fits(other: Tensor, x: Tensor) -> bool:
    """Whether a tensor broadcasts to the shape of ``x``, whose shape it leaves alone."""
    if other.device != x.device or other.dim() > x.dim():
        return False
    return all(size in (1, own) for size, own in zip(reversed(other.shape), reversed(x.shape), strict=False))


def _selected(mask: Any, x: Any, other: Any) -> Factor | None:
    """A factored gradient where a shared mask holds, and zeros elsewhere."""
    if type(x) is not Batched or x.factor is None or type(mask) is Batched or mask.dtype != torch.bool or not _fits(mask, x):
        return None
    if isinstance(other, Tensor):
        if type(other) is Batched or other.dim() or must_be_functional(other) or other != 0:
            return None
    elif other != 0:
        return None
    return Hadamard(x.factor, mask.expand(x.shape))


def _is_outer_product(a: Any, b: Any) -> bool:
    """Whether ``a * b`` is a column times a row: so the backward of ``mv`` and ``outer`` writes a weight gradient."""
    return (
        type(a) is Batched
        and type(b) is Batched
        and a.ctx.backward
        and a.dim() == 2
        and a.shape[1] == 1
        and (b.dim() == 1 or (b.dim() == 2 and b.shape[0] == 1))
        and a.dtype == b.dtype
        and is_inexact(a)
    )


@rule(aten.mul.Tensor)
def mul(self: Any, other: Any) -> Any:
    """Scaling keeps a factor; a column times a row becomes one."""
    if type(self) is Batched and self.factor is not None and _is_scale(other, self):
        return self.factor.scale(other)
    if type(other) is Batched and other.factor is not None and _is_scale(self, other):
        return other.factor.scale(self)
    product = _multiplied(self, other) or _multiplied(other, self)
    if product is not None:
        return product
    if _is_outer_product(self, other):
        return Outer(self.physical, other.physical.reshape(other.n, 1, -1))
    if _is_outer_product(other, self):
        return Outer(other.physical, self.physical.reshape(self.n, 1, -1))
    return _mul(self, other)


@rule(aten.mul.Scalar)
def mul_scalar(self: Any, other: Any) -> Any:
    return mul(self, other)


@rule(aten.div.Tensor)
def div(self: Any, other: Any) -> Any:
    if type(self) is Batched and self.factor is not None and _is_scale(other, self):
        # The reciprocal of a tiny number is infinite, and its product with zero no number.
        if not isinstance(other, torch.Tensor) and 1e-30 < abs(other) < 1e30:
            return self.factor.scale(1 / other)
    return _div(self, other)


@rule(aten.div.Scalar)
def div_scalar(self: Any, other: Any) -> Any:
    return div(self, other)


@rule(aten.neg.default)
def neg(self: Any) -> Any:
    if self.factor is not None:
        return self.factor.scale(-1)
    return _neg(self)


@rule(aten.add.Tensor)
def add(self: Any, other: Any, *, alpha: Any = 1) -> Any:
    """Two factors of one shape add up to a ``Sum``: a parameter used more than once."""
    if (
        alpha == 1
        and type(self) is Batched
        and self.factor is not None
        and type(other) is Batched
        and other.factor is not None
        and self.shape == other.shape
        and self.dtype == other.dtype
    ):
        return _factors.add(self.factor, other.factor)
    return _add(self, other) if alpha == 1 else _add(self, other, alpha=alpha)


@rule(aten.where.self)
def where(condition: Any, self: Any, other: Any) -> Any:
    """A mask of the weights themselves keeps their gradient factored."""
    return _selected(condition, self, other) or _where(condition, self, other)


@rule(aten.masked_fill.Scalar)
def masked_fill_scalar(self: Any, mask: Any, value: Any) -> Any:
    if type(self) is Batched and self.factor is not None and type(mask) is not Batched and value == 0:
        kept = _selected(~mask, self, value)
        if kept is not None:
            return kept
    return _masked_fill_scalar(self, mask, value)
