"""Python values of per-sample tensors: where all samples agree there is one, elsewhere the batch may be split by value."""

from __future__ import annotations

import linecache
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import optree
import torch
from torch import Tensor

from per_sample._batched import Batched, Context
from per_sample._caller import Restart
from per_sample._errors import DataDependentError
from per_sample._options import current_options

if TYPE_CHECKING:
    from types import FrameType


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
    several = (
        "`with per_sample.options(split_batch=True):` around the call runs samples of different values apart, here in "
        f"{max(groups) + 1} groups."
    )
    raise DataDependentError(_message(what, several))


def _message(what: str, hint: str) -> str:
    place, installed = _place()
    remedies = ["Use `torch.where` or masks instead of a branch, keep the value as a tensor, or return it with `has_aux=True`.", hint]
    if installed:
        remedies.reverse()
    return f"{what} asks for the value of a tensor that differs between samples{place}. {' '.join(remedies)}"


def _place() -> tuple[str, bool]:
    """Where the program stands, the innermost line that is neither this library's nor torch's, and whether that is installed code."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not any(path.is_relative_to(home) for home in _OURS):
            line = linecache.getline(str(path), frame.f_lineno).strip()
            place = f", in {'/'.join(path.parts[-2:])}, line {frame.f_lineno}" + (f" (`{line}`)" if line else "")
            return place, "site-packages" in path.parts
        frame = frame.f_back
    return "", False


_OURS = [Path(package.__file__).parent for package in (torch, optree, sys.modules[__package__]) if package.__file__]


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
