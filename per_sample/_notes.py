"""What is said below an error of torch's: its message shows the shapes of the batch that was run, the caller wrote those of one sample."""

from __future__ import annotations

import traceback
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from per_sample._batched import Batched
from per_sample._errors import PerSampleError
from per_sample._interpreter import dispatch


def add_notes(err: Exception, fn: Any, args: tuple[Any, ...], n: int) -> None:
    """Tell which op raised ``err``, and the shapes that one sample's tensors have there; and how a module is made a function."""
    if isinstance(err, PerSampleError):
        return
    if isinstance(fn, nn.Module):
        err.add_note(
            f"`fn` is a {type(fn).__name__}, which is called with one sample's arguments as they are. `functional(module, loss_fn)` makes "
            "a function of a module's parameters."
        )
    calls = [frame.f_locals for frame, _ in traceback.walk_tb(err.__traceback__) if frame.f_code is dispatch.__code__]
    if calls:
        shapes = _shapes((calls[-1]["args"], calls[-1]["kwargs"]))
        err.add_note(
            f"per_sample ran `{calls[-1]['func']}` for {n} samples at once, so that the message may show shapes of the whole batch. One "
            f"sample's tensors have the shapes {shapes}."
        )
    elif isinstance(err, (RuntimeError, IndexError, ValueError)) and not getattr(fn, "keep_batch_dim", False):
        own = _shapes([x for x in pytree.tree_leaves(args) if type(x) is Batched and not x.shared])
        err.add_note(
            f"`fn` sees ONE sample, without a batch axis (see `functional`, and `keep_batch_dim`): its tensors have the shapes {own}."
        )


def _shapes(tree: Any) -> str:
    """The shapes of the first tensors."""
    tensors = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    return ", ".join(str(list(x.shape)) for x in tensors[:8]) or "(there are none)"
