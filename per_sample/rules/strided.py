"""Views that count on strides, which the sample axis may spoil."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from per_sample._batched import physical, samples, storage_of
from per_sample._errors import UnsupportedError
from per_sample._registry import rule

aten = torch.ops.aten


@rule(aten.as_strided.default)
def as_strided(self: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    """Each sample strided by itself, where it lies in one piece and is not left; else the fallback, where no other sample is met."""
    value = self.physical
    where = _in_one_piece(self, value, size, stride, storage_offset)
    if where is not None:
        return value.as_strided(*where)
    if _stays_inside(self, size, stride, storage_offset):
        return NotImplemented
    raise UnsupportedError("`as_strided` with these strides would read other samples' memory; call `.contiguous()` first.")


@rule(aten.as_strided_scatter.default)
def as_strided_scatter(self: Any, src: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    n = samples(self, src)
    value = physical(self, n).contiguous()
    where = _in_one_piece(self, value, size, stride, storage_offset) if self.is_contiguous() else None
    if where is None:
        raise UnsupportedError("`as_strided_scatter` of a per-sample tensor that is not contiguous; use `slice_scatter` or `index_put`.")
    return torch.as_strided_scatter(value, physical(src, n), *where)


def _in_one_piece(x: Any, value: Tensor, size: Any, stride: Any, storage_offset: int | None) -> tuple[Any, Any, Any] | None:
    """Size, strides and offset in ``value [n, *shape]`` where every sample fills a piece of memory of its own, its axes in any order.

    None where a sample's would leave its piece.
    """
    piece = math.prod(x.shape)
    start = 0 if storage_offset is None else storage_offset - x.storage_offset()
    last = start + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if not _fills(value) or not 0 <= start <= last < piece or 0 in size:
        return None
    return (value.shape[0], *size), (piece, *stride), value.storage_offset() + start


def _fills(value: Tensor) -> bool:
    """Whether the axes, the samples' the outermost, leave no gap and do not overlap."""
    expected = 1
    for step, size in sorted(zip(value.stride()[1:], value.shape[1:], strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return value.shape[0] == 1 or value.stride(0) == expected


def _stays_inside(x: Any, size: Any, stride: Any, storage_offset: int | None) -> bool:
    """Whether all that is asked for are elements of one sample, found along its own axes."""
    if 0 in size:
        return True
    start = 0 if storage_offset is None else storage_offset - x.storage_offset()
    wanted = [(s, step) for s, step in zip(size, stride, strict=True) if s > 1 and step]
    for own, step in sorted(zip(x.shape, x.stride(), strict=True), key=lambda axis: -axis[1]):
        if own == 1 or step == 0:
            continue
        # Steps along this axis, several at a time or overlapping windows of them.
        last = start // step + sum((s - 1) * (by // step) for s, by in wanted if by % step == 0)
        if start < 0 or last >= own:
            return False
        start %= step
        wanted = [axis for axis in wanted if axis[1] % step]
    return start == 0 and not wanted


@rule(aten.view_as_complex.default)
def view_as_complex(self: Any) -> Any:
    value = self.physical
    if value.stride(-1) == 1 and all(step % 2 == 0 for step in (*value.stride()[:-1], value.storage_offset())):
        return torch.view_as_complex(value)
    # A copy: from now on a write into either would not show in the other.
    copied = value.contiguous()
    self.ctx.split.update((storage_of(x), x) for x in (value, copied))
    return torch.view_as_complex(copied)
