"""What mixtures of experts need: products of groups of rows, and histograms that count the groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._registry import rule

aten = torch.ops.aten


def _grouped(left: Tensor, right: Tensor, ends: Tensor, dtype: Any) -> Tensor:
    return aten._grouped_mm(left, right, ends.to(torch.int32), None, dtype)


def _groups(offs: Tensor, rows: int) -> Tensor:
    """The group of each of a sample's rows ``[n, rows]``; rows behind the last group have the number of groups."""
    row = torch.arange(rows, device=offs.device, dtype=offs.dtype).expand(offs.shape[0], rows)
    return torch.searchsorted(offs.contiguous(), row.contiguous(), right=True)


@rule(aten._grouped_mm.default)
def grouped_mm(self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows by experts ``[s, k] x [e, k, o]``, and the experts' gradient ``[k, s] x [s, o]``; other forms are left to the fallback."""
    if offs is None or bias is not None or self.dim() != 2:
        return NotImplemented
    n = samples(self, mat2, offs)
    ends = physical(offs, n)
    if mat2.dim() == 2:
        return _experts_gradient(physical(self, n), physical(mat2, n), ends, out_dtype)
    if type(mat2) is Batched:
        # Each sample's experts are experts of their own; a last one takes the rows that belong to none.
        weights = mat2.physical
        spare = weights.new_zeros(n, 1, *weights.shape[2:])
        return _rows_by_experts(physical(self, n), torch.cat((weights, spare), 1).flatten(0, 1), ends, out_dtype, own=True)
    return _rows_by_experts(physical(self, n), torch.cat((mat2, mat2.new_zeros(1, *mat2.shape[1:]))), ends, out_dtype, own=False)


def _rows_by_experts(rows: Tensor, weights: Tensor, ends: Tensor, dtype: Any, *, own: bool) -> Tensor:
    """All samples' rows, sorted by expert, so that each expert is met once."""
    n, s, k = rows.shape
    group = _groups(ends, s)
    if own:
        group = group + (ends.shape[1] + 1) * torch.arange(n, device=group.device).unsqueeze(1)
    flat = group.flatten()
    order = flat.argsort(stable=True)
    last = torch.bincount(flat, minlength=weights.shape[0]).cumsum(0)
    found = _grouped(rows.reshape(n * s, k)[order], weights, last, dtype)
    out = torch.empty_like(found)
    out[order] = found
    return out.view(n, s, -1)


def _experts_gradient(left: Tensor, right: Tensor, ends: Tensor, dtype: Any) -> Tensor:
    """Groups of rows of one sample after the other; rows of no group are zeroed, since they fall into the next sample's first."""
    n, k, s = left.shape
    # In both operands: zero times a NaN of this sample's would be a NaN of the next one's.
    none = (_groups(ends, s) == ends.shape[1]).unsqueeze(2)
    flat = right.masked_fill(none, 0).reshape(n * s, -1)
    left = left.masked_fill(none.mT, 0)
    last = (ends + s * torch.arange(n, device=ends.device, dtype=ends.dtype).unsqueeze(1)).flatten()
    # The kernel wants rows that begin at multiples of 16 bytes, as those of the program do.
    out = _grouped(left.transpose(1, 2).reshape(n * s, k).contiguous().t(), flat, last, dtype)
    return out.view(n, ends.shape[1], k, -1)


@rule(aten.histc.default)
def histc(self: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    if min == max:
        # The range is each sample's own.
        return NotImplemented
    value = self.physical.reshape(self.n, -1)
    inside = (value >= min) & (value <= max)
    place = ((value - min) * bins / (max - min)).clamp(0, bins - 1)
    bucket = torch.where(inside, place, 0).long()
    return value.new_zeros(self.n, bins).scatter_add(1, bucket, inside.to(value.dtype))
