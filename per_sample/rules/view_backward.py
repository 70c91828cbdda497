"""Backward ops of views, copies that change layout or dtype, and lazily conjugated views."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import samples
from per_sample._combinators import axis
from per_sample._registry import rule

aten = torch.ops.aten


@rule(aten.select_backward.default)
def select_backward(grad_output: Any, input_sizes: Any, dim: int, index: int) -> Any:
    n = samples(grad_output)
    return aten.select_backward(grad_output.physical, [n, *input_sizes], axis(dim, len(input_sizes)), index)


@rule(aten.slice_backward.default)
def slice_backward(grad_output: Any, input_sizes: Any, dim: int, start: int, end: int, step: int) -> Any:
    n = samples(grad_output)
    return aten.slice_backward(grad_output.physical, [n, *input_sizes], axis(dim, len(input_sizes)), start, end, step)


@rule(aten.diagonal_backward.default)
def diagonal_backward(grad_output: Any, input_sizes: Any, offset: int, dim1: int, dim2: int) -> Any:
    ndim = len(input_sizes)
    sizes = [samples(grad_output), *input_sizes]
    return aten.diagonal_backward(grad_output.physical, sizes, offset, axis(dim1, ndim), axis(dim2, ndim))


@rule(aten.unfold_backward.default)
def unfold_backward(grad_in: Any, input_sizes: Any, dim: int, size: int, step: int) -> Any:
    n = samples(grad_in)
    if not input_sizes:
        return grad_in.physical.reshape(n, -1).sum(1)  # at most one element
    return aten.unfold_backward(grad_in.physical, [n, *input_sizes], axis(dim, len(input_sizes)), size, step)


@rule(aten.clone.default)
def clone(self: Any, *, memory_format: Any = None) -> Any:
    if self.factor is not None:
        return self.factor
    return _copy(self.physical, memory_format, self.ctx.functional)


@rule(aten._to_copy.default)
def to_copy(
    self: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Any:
    if layout not in (None, torch.strided) or pin_memory:
        return NotImplemented
    value = self.physical
    copied = value.to(device=device, dtype=dtype or value.dtype, non_blocking=non_blocking, copy=True)
    if memory_format in (None, torch.preserve_format):
        return copied
    return _copy(copied, memory_format, self.ctx.functional)


def _copy(value: torch.Tensor, memory_format: Any, functional: bool) -> torch.Tensor:
    """A copy in a layout that counts the axes of one sample."""
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        if functional:
            # A caller's vmap has no such layouts; values are the same in any.
            return value.clone()
        return value.flatten(0, 1).clone(memory_format=memory_format).unflatten(0, value.shape[:2])
    return value.clone() if memory_format is None else value.clone(memory_format=memory_format)


@rule(aten._conj.default)
def conj(self: Any) -> Any:
    """Resolved at once: below autograd nobody would resolve a lazily conjugated physical tensor."""
    return self.physical.conj_physical()


@rule(aten._neg_view.default)
def neg_view(self: Any) -> Any:
    return -self.physical
