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


# The arguments that the single forms take by position, in their order in every form; they have other names there.
_POSITIONAL = ("self", "tensor1", "tensor2", "tensors1", "other", "src", "weights", "weight", "exponent", "scalar", "scalars")


def _in_turn(name: str, *args: Any, **kwargs: Any) -> Any:
    single = name.removeprefix("_foreach_")
    tensors, *given = [*args, *(kwargs.pop(key) for key in _POSITIONAL if key in kwargs)]
    if single.startswith("addc") and len(given) > 2:
        kwargs["value"] = given.pop()
    if not _is_known(single, tensors, [*given, *kwargs.values()]):
        return NotImplemented

    def of(x: Any, i: int) -> Any:
        return x[i] if isinstance(x, (list, tuple)) else x

    for i, x in enumerate(tensors):
        rest, options = [of(arg, i) for arg in given], {key: of(arg, i) for key, arg in kwargs.items()}
        if hasattr(x, single):
            getattr(x, single)(*rest, **options)
        else:
            x.copy_(getattr(torch, single.removesuffix("_"))(x.clone(), *rest, **options))
    return list(tensors)


def _is_known(single: str, tensors: Any, given: list[Any]) -> bool:
    """Whether the single form does the same; if not, torch's own says what is wrong, or knows what has no derivative."""
    if not len(tensors) or any(len(x) != len(tensors) for x in given if isinstance(x, (list, tuple))):
        return False
    if any(isinstance(x, Tensor) and x.ndim for x in given):  # scalars in one tensor
        return False
    bounds = given if single in ("maximum_", "minimum_") else []
    return all(isinstance(x, (list, tuple)) and isinstance(x[0], Tensor) for x in bounds)


LISTS: dict[Any, Callable[..., Any]] = {
    getattr(torch, name): partial(_in_turn, name) for name in dir(torch) if name.startswith("_foreach_") and name.endswith("_")
}
