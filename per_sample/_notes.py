"""What is said below an error of torch's: its message shows the shapes of the batch that was run, the caller wrote those of one sample."""

from __future__ import annotations

import traceback
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from per_sample._errors import PerSampleError
from per_sample._interpreter import dispatch


def add_notes(err: Exception, fn: Any, n: int) -> None:
    """Tell which op raised ``err``, and the shapes that one sample's tensors have there; and how a module is made a function."""
    if isinstance(err, PerSampleError):
        return
    if isinstance(fn, nn.Module):
        err.add_note(
            f"`fn` is a {type(fn).__name__}, which is called with one sample's arguments as they are. `functional(module, loss_fn)` makes "
            "a function of a module's parameters."
        )
    calls = [frame.f_locals for frame, _ in traceback.walk_tb(err.__traceback__) if frame.f_code is dispatch.__code__]
    if not calls:
        return
    call = calls[-1]
    shapes = [str(list(x.shape)) for x in pytree.tree_leaves((call["args"], call["kwargs"])) if isinstance(x, Tensor)]
    err.add_note(
        f"per_sample ran `{call['func']}` for {n} samples at once, so that the message may show shapes of the whole batch. One sample's "
        f"tensors have the shapes {', '.join(shapes) or '(there are none)'}."
    )
