"""Functions that write into lists of tensors (`torch._foreach_mul_` and the like), as a write into each tensor in turn.

Where one of the tensors is a view, autograd loses what they write into per-sample tensors; torch.func.grad, AOTAutograd and a second
derivative lose it elsewhere, too (torch 2.13).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def _in_turn(name: str, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    single = name.removeprefix("_foreach_")
    # Arguments have other names in the single forms.
    given = [*args, *(x for key, x in kwargs.items() if key not in ("alpha", "value"))]
    named = {key: x for key, x in kwargs.items() if key in ("alpha", "value")}
    if single.startswith("addc") and len(given) > 2:
        named["value"] = given.pop()
    if isinstance(named.get("value"), Tensor):
        return NotImplemented  # scalars in one tensor, of which torch has no derivative

    def of(x: Any, i: int) -> Any:
        return x[i] if isinstance(x, (list, tuple)) else x

    for i, x in enumerate(tensors):
        rest, options = [of(arg, i) for arg in given], {key: of(arg, i) for key, arg in named.items()}
        if hasattr(x, single):
            getattr(x, single)(*rest, **options)
        else:
            x.copy_(getattr(torch, single.removesuffix("_"))(x.clone(), *rest, **options))
    return list(tensors)


LISTS: dict[Any, Callable[..., Any]] = {
    getattr(torch, name): partial(_in_turn, name) for name in dir(torch) if name.startswith("_foreach_") and name.endswith("_")
}
