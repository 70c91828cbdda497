"""Bags of embeddings: summed, averaged, or the maximum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._factors import Rows
from per_sample._registry import rule
from per_sample.rules.embedding import embedding, frequencies
from per_sample.rules.norm import context

aten = torch.ops.aten
_MEAN, _MAX = 1, 2


def _bags(offsets: Any, positions: int, bags: int, n: int) -> tuple[Tensor, Tensor]:
    """The bag of each position, ``[n, t]``, and whether there is one: a last offset may close the last bag early."""
    position = torch.arange(positions, device=offsets.device).expand(n, positions)
    bag = torch.searchsorted(physical(offsets, n).contiguous(), position.contiguous(), right=True) - 1
    return bag.clamp(0, max(bags - 1, 0)), bag < bags


def _kept(index: Tensor, inside: Tensor, padding_idx: int) -> Tensor:
    return inside & (index != padding_idx) if padding_idx >= 0 else inside


def _bag_sizes(bag: Tensor, kept: Tensor, bags: int) -> Tensor:
    return kept.new_zeros(bag.shape[0], bags, dtype=torch.int64).scatter_add(1, bag, kept.long())


@rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    n = samples(weight, indices, offsets, per_sample_weights)
    bags = offsets.shape[0] - include_last_offset
    index = physical(indices, n)
    bag, inside = _bags(offsets, index.shape[1], bags, n)
    kept = _kept(index, inside, padding_idx)
    own = type(weight) is Batched or type(indices) is Batched
    rows = embedding(weight, indices, -1, scale_grad_by_freq) if own else torch.embedding(weight, indices).expand(n, -1, -1)
    if per_sample_weights is not None:
        rows = rows * physical(per_sample_weights, n).unsqueeze(2)
    if mode == _MAX:
        out, largest = _maximum(rows, index, bag, kept, bags)
        return out, bag, _bag_sizes(bag, kept, bags), largest
    rows = torch.where(kept.unsqueeze(2), rows, 0)
    out = rows.new_zeros(n, bags, rows.shape[2]).scatter_add(1, bag.unsqueeze(2).expand(rows.shape), rows)
    sizes = _bag_sizes(bag, kept, bags)
    if mode == _MEAN:
        out = out / sizes.clamp(min=1).unsqueeze(2)
    return out, bag, sizes, sizes


def _maximum(rows: Tensor, index: Tensor, bag: Tensor, kept: Tensor, bags: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each bag, ``[n, bags, i]``, and the numbers of the first rows that hold them."""
    n, positions, width = rows.shape
    where = bag.unsqueeze(2).expand(rows.shape)
    low = torch.full((n, bags, width), -torch.inf, dtype=rows.dtype, device=rows.device)
    out = low.scatter_reduce(1, where, rows.where(kept.unsqueeze(2), -torch.inf), "amax")
    position = torch.arange(positions, device=rows.device).view(1, -1, 1)
    holds = kept.unsqueeze(2) & (rows == out.gather(1, where))
    last = torch.full((n, bags, width), max(positions - 1, 0), device=rows.device)
    first = last.scatter_reduce(1, where, torch.where(holds, position, positions), "amin")
    filled = (_bag_sizes(bag, kept, bags) > 0).unsqueeze(2)
    if positions == 0:
        return torch.zeros_like(out), first
    largest = index.gather(1, first.flatten(1)).view(first.shape)
    return out.where(filled, 0), largest


def _gradient_at(grad: Any, bag: Tensor, n: int) -> Tensor:
    """Each position's row of the gradient ``[n, t, i]``."""
    value = physical(grad, n)
    return value.gather(1, bag.unsqueeze(2).expand(*bag.shape, value.shape[2]))


@rule(aten._embedding_bag_backward.default)
def embedding_bag_backward(
    grad: Any,
    indices: Any,
    offsets: Any,
    offset2bag: Any,
    bag_size: Any,
    maximum_indices: Any,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Any,
    padding_idx: int = -1,
) -> Any:
    """A ``Rows`` factor; frequencies are counted within one sample."""
    if mode == _MAX:
        return _maximum_backward(grad, bag_size, maximum_indices, num_weights)
    n = samples(grad, indices, offsets, per_sample_weights)
    index, bags = physical(indices, n), grad.shape[0]
    bag, inside = _bags(offsets, index.shape[1], bags, n)
    kept = _kept(index, inside, padding_idx)
    g = _gradient_at(grad, bag, n)
    if mode == _MEAN:
        g = g / _bag_sizes(bag, kept, bags).clamp(min=1).gather(1, bag).unsqueeze(2)
    if per_sample_weights is not None:
        g = g * physical(per_sample_weights, n).unsqueeze(2)
    if scale_grad_by_freq:
        g = g / frequencies(index, num_weights).unsqueeze(2).to(g.dtype)
    factor = Rows(torch.where(kept, index, -1), g, num_weights)
    ctx = context(grad, indices, offsets, per_sample_weights)
    return factor if ctx.backward else factor.materialize(functional=ctx.functional)


def _maximum_backward(grad: Any, bag_size: Any, largest: Any, num_weights: int) -> Tensor:
    n = samples(grad, bag_size, largest)
    g = torch.where(physical(bag_size, n).unsqueeze(2) > 0, physical(grad, n), 0)
    return g.new_zeros(n, num_weights, g.shape[2]).scatter_add(1, physical(largest, n), g)


@rule(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_per_sample_weights_backward(
    grad: Any, weight: Any, indices: Any, offsets: Any, offset2bag: Any, mode: int, padding_idx: int = -1
) -> Any:
    n = samples(grad, weight, indices, offsets)
    index = physical(indices, n)
    bag, inside = _bags(offsets, index.shape[1], grad.shape[0], n)
    own = type(weight) is Batched or type(indices) is Batched
    rows = embedding(weight, indices) if own else torch.embedding(weight, indices).expand(n, -1, -1)
    return torch.where(_kept(index, inside, padding_idx), (rows * _gradient_at(grad, bag, n)).sum(2), 0)
