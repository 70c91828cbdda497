"""Views, reshapes and the ops that undo them. Views are views of the physical tensor, so aliasing is kept."""

from __future__ import annotations

import math
from typing import Any

import torch

from per_sample._batched import Batched, physical, samples, wrap_factor
from per_sample._combinators import as_is, axes, axis, dims, table
from per_sample._factors import Factor, Outer, Sum, View
from per_sample._registry import rule

aten = torch.ops.aten

table(
    dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unbind.int,
    aten.diagonal.default,
    aten.unfold.default,
    aten.flip.default,
    aten.rot90.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.diagonal_scatter.default,
)
table(
    as_is,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)


def reshape_factor(factor: Factor, shape: Any) -> Factor:
    """The factor under another shape; axes of size one in front of an outer product's matrix come and go freely."""
    shape = _without_minus_one(factor.shape, shape)
    if isinstance(factor, Sum):
        return Sum(tuple(reshape_factor(term, shape) for term in factor.terms))
    if isinstance(factor, View):
        factor = factor.base
    if isinstance(factor, Outer):
        matrix = factor.shape[-2:]
        if len(shape) >= 2 and shape[-2:] == matrix:
            return _led(factor, shape[:-2])
        if math.prod(factor.shape[:-2]) == 1:
            factor = _led(factor, ())
    return factor.reshape(shape)


def _led(factor: Outer, lead: tuple[int, ...]) -> Outer:
    """The same matrices with other axes in front of them."""
    n = factor.left.shape[0]
    left = factor.left.reshape(n, *lead, *factor.left.shape[-2:])
    return Outer(left, factor.right.reshape(n, *lead, *factor.right.shape[-2:]))


def _permuted_factor(factor: Factor, order: list[int]) -> Factor | None:
    """The factor with its axes (0 is the first of a sample) in another order, where its form can express that."""
    shape = tuple(factor.shape[d] for d in order)
    wide = [d for d, size in enumerate(factor.shape) if size != 1]
    if [d for d in order if factor.shape[d] != 1] == wide:
        return reshape_factor(factor, shape)
    if len(wide) == 2:
        swapped = reshape_factor(factor, tuple(factor.shape[d] for d in wide)).transpose()
        return None if swapped is None else reshape_factor(swapped, shape)
    if order[:-2] == list(range(len(order) - 2)):
        return factor.transpose()
    return None


def _without_minus_one(old: tuple[int, ...], new: Any) -> tuple[int, ...]:
    if -1 not in new:
        return tuple(new)
    known = -math.prod(new)
    return tuple(math.prod(old) // known if s == -1 else s for s in new)


@rule(aten.view.default)
def view(self: Any, size: Any) -> Any:
    if self.factor is not None and math.prod(self.shape):
        return reshape_factor(self.factor, size)
    return self.physical.view(self.n, *size)


@rule(aten._unsafe_view.default)
def unsafe_view(self: Any, size: Any) -> Any:
    """Nobody looks at the argument again, so writes into the result need not show in it: no view of the argument's."""
    if self.factor is not None and math.prod(self.shape):
        return wrap_factor(self.ctx, reshape_factor(self.factor, size))
    return self.physical.reshape(self.n, *size)


@rule(aten.view_as_real.default)
def view_as_real(self: Any) -> Any:
    """Where a caller records, its tensors may be lazily conjugated."""
    return torch.view_as_real(self.physical.resolve_conj())


@rule(aten._reshape_alias.default)
def reshape_alias(self: Any, size: Any, stride: Any) -> Any:
    return self.physical.view(self.n, *size)


@rule(aten.t.default)
def t(self: Any) -> Any:
    if type(self.factor) is Outer and len(self.shape) == 2:
        return self.factor.transpose()  # every linear layer's weight gradient comes through here
    ndim = self.dim()
    if ndim > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {ndim}D")
    return _permuted(self, [2, 1]) if ndim == 2 else _same(self)


@rule(aten.transpose.int)
def transpose(self: Any, dim0: int, dim1: int) -> Any:
    ndim = self.dim()
    if ndim == 0:
        # A 0-dim tensor has axes 0 and -1 by name.
        axes((dim0, dim1), 1)
        return _same(self)
    a, b = axis(dim0, ndim), axis(dim1, ndim)
    if self.factor is None:
        return self.physical.transpose(a, b)
    order = list(range(1, ndim + 1))
    order[a - 1], order[b - 1] = b, a
    return _permuted(self, order)


@rule(aten.permute.default)
def permute(self: Any, dims: Any) -> Any:
    return _permuted(self, axes(dims, self.dim()))


def _permuted(x: Any, order: list[int]) -> Any:
    """``order`` names physical axes, without the sample axis."""
    if x.factor is not None:
        permuted = _permuted_factor(x.factor, [d - 1 for d in order])
        if permuted is not None:
            return permuted
    return x.physical.permute(0, *order)


def _same(x: Any) -> Any:
    # Two wrappers may hold one physical tensor: nothing ever changes a physical tensor's sizes in place.
    return x.factor if x.factor is not None else x.physical


@rule(aten.alias.default, aten.lift_fresh.default)
def alias(self: Any) -> Any:
    return _same(self)


@rule(aten.expand.default)
def expand(self: Any, size: Any, *, implicit: bool = False) -> Any:
    value = self.physical
    missing = len(size) + 1 - value.dim()
    if missing > 0:
        value = _insert(value, missing)
    return value.expand(value.shape[0], *size)


def _insert(value: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        value = value.unsqueeze(1)
    return value


@rule(aten.unsqueeze.default)
def unsqueeze(self: Any, dim: int) -> Any:
    at = axis(dim, self.dim() + 1)
    if self.factor is not None:
        shape = list(self.shape)
        shape.insert(at - 1, 1)
        return reshape_factor(self.factor, tuple(shape))
    return self.physical.unsqueeze(at)


def _squeezed(x: Any, where: list[int]) -> Any:
    """Without the physical axes named, as far as they have size one."""
    if x.factor is not None:
        shape = tuple(s for i, s in enumerate(x.shape, start=1) if i not in where or s != 1)
        return reshape_factor(x.factor, shape)
    # An empty list of axes squeezes nothing, and gives a view all the same.
    return x.physical.squeeze(where)


@rule(aten.squeeze.default)
def squeeze(self: Any) -> Any:
    return _squeezed(self, list(range(1, self.dim() + 1)))


@rule(aten.squeeze.dim)
def squeeze_dim(self: Any, dim: int) -> Any:
    return _squeezed(self, [axis(dim, self.dim())] if self.dim() else [])


@rule(aten.squeeze.dims)
def squeeze_dims(self: Any, dim: Any) -> Any:
    return _squeezed(self, axes(dim, self.dim()) if self.dim() else [])


@rule(aten.cat.default)
def cat(tensors: Any, dim: int = 0) -> Any:
    n = samples(tensors)
    # By old custom an empty 1-D tensor joins tensors of any rank.
    legacy = [t for t in tensors if t.dim() != 1 or t.shape[0] != 0]
    if not legacy:
        return torch.cat([physical(t, n) for t in tensors], 1)
    where = axis(dim, legacy[0].dim())
    if len(legacy) < len(tensors):
        return NotImplemented if _promotes(tensors, legacy) else torch.cat([physical(t, n) for t in legacy], where)
    return torch.cat([physical(t, n) for t in tensors], where)


def _promotes(tensors: Any, legacy: Any) -> bool:
    """Whether the empty tensors left out might change the result's dtype, or hold the only per-sample one."""
    return len({t.dtype for t in tensors}) > 1 or not any(type(t) is Batched for t in legacy)


@rule(aten.stack.default)
def stack(tensors: Any, dim: int = 0) -> Any:
    n = samples(tensors)
    return torch.stack([physical(t, n) for t in tensors], axis(dim, tensors[0].dim() + 1))


@rule(aten.repeat.default)
def repeat(self: Any, repeats: Any) -> Any:
    value = self.physical
    return _insert(value, len(repeats) + 1 - value.dim()).repeat(1, *repeats)


@rule(aten.roll.default)
def roll(self: Any, shifts: Any, dims: Any = ()) -> Any:
    if dims:
        return torch.roll(self.physical, shifts, axes(dims, self.dim()))
    return torch.roll(self.physical.reshape(self.n, -1), shifts, 1).reshape(self.n, *self.shape)


@rule(aten.tril.default)
def tril(self: Any, diagonal: int = 0) -> Any:
    return torch.tril(self.physical, diagonal) if self.dim() > 1 else NotImplemented


@rule(aten.triu.default)
def triu(self: Any, diagonal: int = 0) -> Any:
    return torch.triu(self.physical, diagonal) if self.dim() > 1 else NotImplemented


@rule(aten.tril_.default)
def tril_(self: Any, diagonal: int = 0) -> Any:
    return self.physical.tril_(diagonal) if self.dim() > 1 else NotImplemented


@rule(aten.triu_.default)
def triu_(self: Any, diagonal: int = 0) -> Any:
    return self.physical.triu_(diagonal) if self.dim() > 1 else NotImplemented


@rule(aten.trace.default)
def trace(self: Any) -> Any:
    return self.physical.diagonal(dim1=1, dim2=2).sum(1) if self.dim() == 2 else NotImplemented


@rule(aten.diag_embed.default)
def diag_embed(self: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    ndim = self.dim() + 1
    return torch.diag_embed(self.physical, offset, axis(dim1, ndim), axis(dim2, ndim))
