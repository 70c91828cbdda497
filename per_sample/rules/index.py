"""Indexing: by axis (`gather`, `scatter`, `index_select`) and by tensors of indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples, wrap
from per_sample._combinators import at_rank, axis, dims, table
from per_sample._registry import rule
from per_sample._values import nonzero

aten = torch.ops.aten

table(
    dims,
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.scatter_add_.default,
)


def _along(index: Any, dim: int, shape: Any, n: int) -> Tensor:
    """A 1-D index as one for `gather` and `scatter`: the same at every other position of ``[n, *shape]``."""
    at = axis(dim, len(shape))
    full = [n, *shape]
    full[at] = index.numel()
    value = physical(index, n).reshape(n, *(1,) * (at - 1), -1, *(1,) * (len(shape) - at))
    return value.expand(full)


@rule(aten.index_select.default)
def index_select(self: Any, dim: int, index: Any) -> Any:
    if self.dim() == 0:
        return NotImplemented
    if type(index) is not Batched:
        return torch.index_select(self.physical, axis(dim, self.dim()), index)
    if type(self) is not Batched and axis(dim, self.dim()) == 1:
        # Rows of one shared table, all samples' at once.
        rows = torch.index_select(self, 0, index.physical.reshape(-1))
        return rows.view(index.n, -1, *self.shape[1:])
    n = index.n
    return torch.gather(physical(self, n), axis(dim, self.dim()), _along(index, dim, self.shape, n))


@rule(aten.index_add.default)
def index_add(self: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    if self.dim() == 0 or source.dim() != self.dim():
        return NotImplemented
    n = samples(self, index, source)
    value, added, at = physical(self, n), physical(source, n), axis(dim, self.dim())
    if type(index) is not Batched:
        return torch.index_add(value, at, index, added, alpha=alpha)
    return torch.scatter_add(value, at, _along(index, dim, self.shape, n), added if alpha == 1 else added * alpha)


@rule(aten.index_add_.default)
def index_add_(self: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    added = index_add(self, dim, index, source, alpha=alpha)
    return added if added is NotImplemented else self.physical.copy_(added)


@rule(aten.index_fill.int_Scalar)
def index_fill(self: Any, dim: int, index: Any, value: Any) -> Any:
    if self.dim() == 0:
        return NotImplemented
    n = samples(self, index)
    at = axis(dim, self.dim())
    if type(index) is not Batched:
        return torch.index_fill(self.physical, at, index, value)
    return torch.scatter(physical(self, n), at, _along(index, dim, self.shape, n), value)


@rule(aten.index_fill.int_Tensor)
def index_fill_tensor(self: Any, dim: int, index: Any, value: Any) -> Any:
    if self.dim() == 0:
        return NotImplemented
    n = samples(self, index, value)
    at = axis(dim, self.dim())
    if type(value) is not Batched and type(index) is not Batched:
        return torch.index_fill(self.physical, at, index, value)
    where = _along(index, dim, self.shape, n)
    filled = physical(value, n).view(n, *(1,) * self.dim()).to(self.dtype).expand(where.shape)
    return torch.scatter(physical(self, n), at, where, filled)


@rule(aten.index_copy.default)
def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
    if self.dim() == 0 or source.dim() != self.dim():
        return NotImplemented
    n = samples(self, index, source)
    at = axis(dim, self.dim())
    if type(index) is not Batched:
        return torch.index_copy(physical(self, n), at, index, physical(source, n))
    return torch.scatter(physical(self, n), at, _along(index, dim, self.shape, n), physical(source, n))


def _layout(self: Any, indices: Any, n: int) -> tuple[list[Any], Any, Any]:
    """The physical indices, and how the result's axes move (as in ``movedim``) to ``[n, *the program's result]``.

    torch puts the indexed axes where the indices stand if they stand side by side, and in front otherwise.
    """
    places = [i for i, x in enumerate(indices) if x is not None]
    given = [indices[i] for i in places]
    rank = max(x.dim() for x in given)
    at = _indexed_axes(places)
    aligned: list[Any] = [None if x is None else at_rank(x, rank) for x in indices]
    if not any(type(x) is Batched for x in given):
        # The sample axis stays in front unless the indexed axes go there.
        return [None, *aligned], (() if _side_by_side(places) else (rank,)), (() if _side_by_side(places) else (0,))
    if type(self) is not Batched:
        return aligned, (at,), (0,)
    # The sample's own index in front takes the indexed axes there with it.
    sample = torch.arange(n, device=given[0].device).view(n, *(1,) * rank)
    return [sample, *aligned], tuple(range(1, 1 + rank)), tuple(range(1 + at, 1 + at + rank))


def _side_by_side(places: list[int]) -> bool:
    return places[-1] - places[0] + 1 == len(places)


def _indexed_axes(places: list[int]) -> int:
    """Where the indexed axes begin in the program's result."""
    return places[0] if _side_by_side(places) else 0


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _positions(indices: Any) -> list[Any]:
    """The indices with each mask replaced by the positions that it selects, of which all samples must have equally many."""
    out: list[Any] = []
    for x in indices:
        if x is None or x.dtype not in (torch.bool, torch.uint8):
            out.append(x)
        elif type(x) is Batched:
            out += [wrap(x.ctx, column) for column in nonzero(x, "Indexing with a mask").unbind(-1)]
        else:
            out += x.nonzero(as_tuple=True)
    return out


@rule(aten.index.Tensor)
def index(self: Any, indices: Any) -> Any:
    if _has_mask(indices):
        if type(self) is Batched and len(indices) == 1 and type(indices[0]) is not Batched:
            return aten.index(self.physical, [None, *indices])
        indices = _positions(indices)
    n = samples(self, indices)
    where, source, destination = _layout(self, indices, n)
    out = aten.index(self.physical if type(self) is Batched else self, where)
    return out.movedim(source, destination) if source != destination else out


@rule(aten.index_put.default)
def index_put(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    if _has_mask(indices):
        filled = _put_where(self, indices, values, accumulate)
        if filled is not NotImplemented:
            return filled
        indices = _positions(indices)
    where, put = _to_put(self, indices, values)
    return aten.index_put(physical(self, samples(self, indices, values)), where, put, accumulate)


@rule(aten.index_put_.default)
def index_put_(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    if _has_mask(indices):
        filled = _put_where(self, indices, values, accumulate)
        if filled is not NotImplemented:
            return self.physical.copy_(filled)
        indices = _positions(indices)
    where, put = _to_put(self, indices, values)
    return aten.index_put_(self.physical, where, put, accumulate)


def _to_put(self: Any, indices: Any, values: Any) -> tuple[list[Any], Tensor]:
    """The physical indices, and the values in the order in which the physical tensor is indexed."""
    n = samples(self, indices, values)
    places = [i for i, x in enumerate(indices) if x is not None]
    indexed = torch.broadcast_shapes(*(indices[i].shape for i in places))
    kept = [s for i, s in enumerate(self.shape) if i not in places]
    at = _indexed_axes(places)
    shape = (*kept[:at], *indexed, *kept[at:])
    # The target has a sample axis by now, whether or not it had one before.
    target = self if type(self) is Batched else next(x for x in (*indices, values) if type(x) is Batched)
    where, source, destination = _layout(target, indices, n)
    put = at_rank(values, len(shape))
    return where, put.expand(n, *shape).movedim(destination, source) if source != destination else put


def _put_where(self: Any, indices: Any, values: Any, accumulate: bool) -> Any:
    """Through one mask: any values where the samples share it, one value where each sample has its own."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool:
        return NotImplemented
    n = samples(self, indices, values)
    if type(mask) is not Batched:
        put = at_rank(values, self.dim() - mask.dim() + 1)
        return aten.index_put(physical(self, n), [None, mask], put, accumulate)
    if accumulate or values.numel() != 1:
        return NotImplemented
    where = mask.physical.reshape(*mask.physical.shape, *(1,) * (self.dim() - mask.dim()))
    value = physical(values, n).reshape(n, *(1,) * self.dim())
    return torch.where(where, value, physical(self, n))
