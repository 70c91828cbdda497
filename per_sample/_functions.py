"""Calls that must be caught before the dispatcher sees them; only programs that need it pay for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from per_sample import _control
from per_sample._batched import Batched, is_batched

if TYPE_CHECKING:
    from per_sample._batched import Context

# To torch, a tensor of uint8 is a mask.
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_CONTROL = {torch.ops.higher_order.cond: _control.cond, torch.ops.higher_order.while_loop: _control.while_loop}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class FunctionMode(TorchFunctionMode):
    """Indexing by numbers that differ between samples (``x[i]``), control flow, and recurrent layers that cuDNN would run as one op."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and self._numbered(args[1]):
            return _get(*args)
        if func is Tensor.__setitem__ and self._numbered(args[1]):
            return _set(*args)
        if func in _CONTROL:
            # Torch takes a mode away while it handles a call, and what branches and bodies call must be caught as well.
            with self:
                return _CONTROL[func](*args, **kwargs)
        with torch.backends.cudnn.flags(enabled=False) if func in _RECURRENT else nullcontext():
            return func(*args, **kwargs)

    def _numbered(self, index: Any) -> bool:
        return any(_is_number(x) and x.ctx is self.ctx for x in (index if isinstance(index, tuple) else (index,)))


def _is_number(x: Any) -> bool:
    return type(x) is Batched and is_batched(x) and x.dim() == 0 and x.dtype in _INTEGERS


def _axes(x: Tensor, index: tuple[Any, ...]) -> list[int]:
    """The axis of ``x`` that each entry of a whole index stands for (-1: none)."""
    taken = [_width(i) for i in index]
    out, at = [], 0
    for entry, width in zip(index, taken, strict=True):
        out.append(at if width else -1)
        at += x.dim() - sum(taken) if entry is Ellipsis else width
    return out


def _width(entry: Any) -> int:
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype is torch.bool else 1


def _position(i: Tensor, size: int) -> Tensor:
    """A number that may count from the end, as an index of one element."""
    return torch.where(i < 0, i.long() + size, i.long()).reshape(1)


def _get(x: Tensor, index: Any) -> Tensor:
    """Each number selects first, along its axis; what remains of the index sees an axis of size 1 there."""
    whole = index if isinstance(index, tuple) else (index,)
    rest = list(whole)
    for k, (entry, axis) in enumerate(zip(whole, _axes(x, whole), strict=True)):
        if _is_number(entry):
            x = x.index_select(axis, _position(entry, x.shape[axis]))
            rest[k] = 0
    return x[tuple(rest)]


def _set(x: Tensor, index: Any, value: Any) -> None:
    """The places that the index names, written in a copy that then replaces everything."""
    places = _get(torch.arange(x.numel(), device=x.device).reshape(x.shape), index)
    new = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    while new.dim() > places.dim() and new.shape[0] == 1:
        new = new[0]
    new = new.expand(places.shape)
    x.copy_(x.flatten().scatter(0, places.flatten(), new.flatten()).reshape(x.shape))
