"""``torch.cond`` and ``torch.while_loop`` as the Python control flow that they stand for; samples that go different ways run apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import is_batched
from per_sample._values import value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._batched import Context


def cond(ctx: Context, pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """One branch is run, as by an ``if``; `where` on both would spread the NaN of the branch not taken through its gradient."""
    if is_batched(pred):
        pred = value_of(pred, "The predicate of `torch.cond`", split=True)
    return true_fn(*operands) if bool(pred) else false_fn(*operands)


def while_loop(ctx: Context, cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any = ()) -> Any:
    """The number of turns is found first, without gradients, so that the batch is split once."""
    turns = _turns(ctx, cond_fn, body_fn, carried, additional)
    if is_batched(turns):
        turns = value_of(turns, "The number of turns of `torch.while_loop`", split=True)
    for _ in range(int(turns)):
        carried = body_fn(*carried, *additional)
    return carried


@torch.no_grad()
def _turns(ctx: Context, cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any) -> Any:
    """How often each sample's loop turns."""
    turns: Any = 0
    while True:
        going = cond_fn(*carried, *additional)
        if not is_batched(going):
            if not bool(going):
                return turns
            carried = body_fn(*carried, *additional)
            turns = turns + 1
            continue
        if not bool(going.physical.any()):
            return turns
        new = body_fn(*carried, *additional)
        carried = tuple(torch.where(going, b, a) if isinstance(b, Tensor) else b for a, b in zip(carried, new, strict=True))
        turns = turns + going.long()
