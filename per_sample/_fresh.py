"""Tensors that the program makes itself, in order to write into them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import Context, wrap

if TYPE_CHECKING:
    from per_sample._entries import Entry

aten = torch.ops.aten

_FROM_NOTHING = {
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty_strided.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.scalar_tensor.default,
    aten.clone.default,
}


def own_copies(ctx: Context, entry: Entry, func: Any, out: Any) -> Any:
    """Each sample's own copy of what an op made, if it is to have one (``Context.expands``).

    Empty tensors of integers are left alone, since torch's C++ code fills them by pointer (lengths).
    """
    if isinstance(out, (tuple, list)):
        return type(out)(own_copies(ctx, entry, func, x) for x in out)
    if not isinstance(out, Tensor) or (entry.views and func is not aten.lift_fresh.default):
        return out
    inexact = out.is_floating_point() or out.is_complex()
    if func is aten.empty.memory_format:
        wanted = inexact
    else:
        wanted = func in _FROM_NOTHING or ctx.expands > 1 or (inexact and func is aten.lift_fresh.default)
    if not wanted:
        return out
    with nullcontext() if ctx.caller is None else ctx.caller():
        return wrap(ctx, out.expand(ctx.n, *out.shape).clone())
