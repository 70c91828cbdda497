"""Embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, context_of, physical, samples
from per_sample._factors import Rows
from per_sample._registry import rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Any:
    """``padding_idx`` and the flags after it matter to the gradient alone: also to the caller's, where it differentiates."""
    ctx = context_of(weight, indices)
    if ctx.functional and (scale_grad_by_freq or (type(weight) is Batched and padding_idx >= 0)):
        # Folded, or as a `gather`, the caller's gradient would count other samples' frequencies, or lose the padding.
        pairs = zip(physical(weight, ctx.n), physical(indices, ctx.n), strict=True)
        return torch.stack([torch.embedding(w, i, padding_idx, scale_grad_by_freq) for w, i in pairs])
    if type(weight) is not Batched:
        return torch.embedding(weight, indices.physical, padding_idx, scale_grad_by_freq, sparse)
    n = weight.n
    index = physical(indices, n)
    # Along an axis of its own: an index out of range raises, it cannot reach another sample's rows.
    value = weight.physical
    flat = index.reshape(n, -1, 1).expand(-1, -1, value.shape[2])
    return value.gather(1, flat).view(*index.shape, value.shape[2])


@rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(grad_output: Any, indices: Any, num_weights: int, padding_idx: int, scale_grad_by_freq: bool) -> Any:
    """A ``Rows`` factor; frequencies are counted within one sample."""
    n = samples(grad_output, indices)
    index = physical(indices, n).reshape(n, -1)
    g = physical(grad_output, n)
    g = g.reshape(n, index.shape[1], g.shape[-1])
    if scale_grad_by_freq:
        g = g / frequencies(index, num_weights).unsqueeze(2).to(g.dtype)
    if padding_idx >= 0:
        index = torch.where(index == padding_idx, -1, index)
    factor = Rows(index, g, num_weights)
    ctx = grad_output.ctx if type(grad_output) is Batched else indices.ctx
    return factor if ctx.backward else factor.materialize(functional=ctx.functional)


def frequencies(index: Tensor, rows: int) -> Tensor:
    """How often each position's row occurs in its sample, ``[n, t]``."""
    ones = torch.ones_like(index)
    counts = index.new_zeros(index.shape[0], rows).scatter_add(1, index, ones)
    return counts.gather(1, index)


@rule(aten._sparse_coo_tensor_with_dims_and_tensors.default)
def sparse_embedding_gradient(
    sparse_dim: int,
    dense_dim: int,
    size: Any,
    indices: Any,
    values: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = False,
    is_coalesced: bool | None = None,
) -> Any:
    """The backward of an embedding with ``sparse=True``: the rows ``values [t, i]`` at ``indices [1, t]``."""
    if sparse_dim != 1 or dense_dim != 1:
        return NotImplemented
    n = samples(indices, values)
    factor = Rows(physical(indices, n)[:, 0], physical(values, n), size[0])
    ctx = values.ctx if type(values) is Batched else indices.ctx
    return factor if ctx.backward else factor.materialize(functional=ctx.functional)
