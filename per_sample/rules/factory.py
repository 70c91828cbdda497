"""Tensors made from a per-sample one: each sample gets its own, so that the program may write into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from per_sample._registry import register, rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

aten = torch.ops.aten


def _like(op: OpOverload) -> Callable[..., Any]:
    """The layout is kept, so a memory format that counts the axes is not passed on."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("memory_format", None)
        return op(self.physical, *args, **kwargs)

    run.__qualname__ = f"like({op})"
    return run


def _new(op: OpOverload) -> Callable[..., Any]:
    def run(self: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        return op(self.physical, [self.n, *size], *args, **kwargs)

    run.__qualname__ = f"new({op})"
    return run


@rule(aten.new_empty_strided.default)
def new_empty_strided(
    self: Any,
    size: Any,
    stride: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Any:
    """The samples one behind the other, each in the layout asked for."""
    span = 1 + sum((s - 1) * step for s, step in zip(size, stride, strict=True)) if all(size) else 0
    return self.physical.new_empty_strided(
        (self.n, *size), (span, *stride), dtype=dtype, layout=layout, device=device, pin_memory=pin_memory
    )


for _op in (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default):
    register(_op, _like(_op), "rule")
for _op in (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default):
    register(_op, _new(_op), "rule")
