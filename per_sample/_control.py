"""``torch.cond`` and ``torch.while_loop`` as the Python control flow that they stand for; samples that go different ways run apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch

from per_sample._batched import is_batched
from per_sample._values import value_of

if TYPE_CHECKING:
    from collections.abc import Callable


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """One branch is run, as by an ``if``; `where` on both would spread the NaN of the branch not taken through its gradient."""
    pred = _bare(pred)
    if is_batched(pred):
        pred = value_of(pred, "The predicate of `torch.cond`", split=True)
    return true_fn(*operands) if bool(pred) else false_fn(*operands)


def while_loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any = ()) -> Any:
    """The number of turns is found first, without gradients, so that the batch is split once.

    Torch hands over the leaves of what is carried, and takes them back.
    """
    devices = {x.device.index for x in (*carried, *additional) if isinstance(x, Tensor) and x.device.type == "cuda"}
    # What the loop draws must be the same in both passes.
    with torch.random.fork_rng(devices):
        turns = _turns(cond_fn, body_fn, carried, additional)
    if is_batched(turns):
        turns = value_of(turns, "The number of turns of `torch.while_loop`", split=True)
    for _ in range(int(turns)):
        carried = tuple(pytree.tree_leaves(body_fn(*carried, *additional)))
    return carried


@torch.no_grad()
def _turns(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any) -> Any:
    """How often each sample's loop turns; a sample that has finished keeps what it carries and does not begin again."""
    turns: Any = 0
    alive: Any = True
    while True:
        alive = alive & _bare(cond_fn(*carried, *additional))
        if is_batched(alive) and alive.ctx.empty:
            value_of(alive, "The condition of `torch.while_loop`")
        if not bool(alive.physical.any() if is_batched(alive) else alive):
            return turns
        new = pytree.tree_leaves(body_fn(*carried, *additional))
        carried = tuple(_where(alive, b, a) for a, b in zip(carried, new, strict=True))
        turns = turns + (alive.long() if isinstance(alive, Tensor) else int(alive))


def _bare(x: Any) -> Any:
    """A truth value without the levels of `torch.func.grad` inside the function, which do not concern it."""
    while isinstance(x, Tensor) and _functorch.is_gradtrackingtensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def _where(alive: Any, new: Any, old: Any) -> Any:
    return torch.where(alive, torch.as_tensor(new), torch.as_tensor(old)) if is_batched(alive) else new
