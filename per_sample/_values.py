"""Python values of per-sample tensors: where all samples agree there is one, elsewhere the batch may be split by value."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from per_sample._batched import Batched, Context
from per_sample._caller import Restart
from per_sample._errors import DataDependentError
from per_sample._options import current_options


def agreed(ctx: Context, rows: Tensor, what: str, *, split: bool = False, number: bool = False) -> Tensor:
    """The row of ``rows [n, ...]`` that all samples have, bit for bit.

    Where they differ the batch is split into groups that agree (if ``split``, or if the options allow it), each of which begins again; or
    the op is refused, as ``what``. ``number``: perhaps `x[i]` asked, which `FunctionMode` can do without the value.
    """
    if ctx.empty:
        # The one sample of zeros that stands for an empty batch has no values of its own.
        raise Restart(ctx, groups=[])
    rows = rows.detach()
    try:
        # A copy, since torch calls a tensor of one element contiguous whatever its strides, and then refuses to look at its bytes.
        value = rows.resolve_conj().resolve_neg().reshape(ctx.n, -1).clone(memory_format=torch.contiguous_format)
        bits = value.view(torch.uint8)
        if bool((bits == bits[:1]).all()):
            return rows[0]
        groups = torch.unique(bits, dim=0, return_inverse=True)[1].tolist()
    except (RuntimeError, DataDependentError) as err:
        if ctx.splits and not ctx.functions and number:
            raise Restart(ctx, functions=True) from err
        # Numbers that nobody has: tensors of a vmap around the transform, fake tensors, the meta device.
        raise DataDependentError(_message(what, "The values are not at hand under `vmap`, while tracing or on the meta device.")) from err
    if ctx.splits and not ctx.functions and number:
        raise Restart(ctx, functions=True)
    if ctx.splits and (split or current_options().split_batch):
        raise Restart(ctx, groups=[[i for i, g in enumerate(groups) if g == k] for k in range(max(groups) + 1)])
    raise DataDependentError(_message(what, "`per_sample.options(split_batch=True)` allows to run samples of different values apart."))


def _message(what: str, hint: str) -> str:
    return (
        f"{what} asks for the value of a tensor that differs between samples. Use `torch.where` or masks instead of a branch, keep the "
        f"value as a tensor, or return it with `has_aux=True`. {hint}"
    )


def value_of(x: Batched, what: str, *, split: bool = False) -> Tensor:
    """The one value of a tensor whose samples agree, for the program itself rather than for an op."""
    ctx = x.ctx
    with nullcontext() if ctx.caller is None else ctx.caller(in_dispatch=False):
        return x.physical.detach() if x.shared else agreed(ctx, x.physical, what, split=split)


Batched.value_of = value_of


def nonzero(x: Batched, what: str) -> Tensor:
    """The positions of every sample's nonzero elements, ``[n, count, rank]``; the samples must have equally many."""
    value = x.physical
    count = agreed(x.ctx, value.reshape(x.n, -1).count_nonzero(1), what)
    return torch.nonzero(value)[:, 1:].reshape(x.n, int(count), x.dim())
