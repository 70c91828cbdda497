"""Pointwise ops: run as they are, once the per-sample arguments line up behind the sample axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import Batched

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload


def pointwise(op: OpOverload) -> Callable[..., Any]:
    """The rule of an op that acts on each element alone and broadcasts."""

    in_place = op._schema.is_mutable

    call = op._op  # without the frame of `OpOverload.__call__`

    def run(*args: Any, **kwargs: Any) -> Any:
        ndim = 0
        dtype = None
        mixed = False
        for a in args:
            if isinstance(a, Tensor):
                if a.dim() > ndim:
                    ndim = a.dim()
                if dtype is None:
                    dtype = a.dtype
                elif a.dtype is not dtype:
                    mixed = True
        if mixed or kwargs:
            aligned, kwargs = _align_mixed(args, kwargs, ndim)
            if in_place:
                # A copy in another dtype would swallow the write.
                aligned[0] = _align(args[0], ndim)
            return op(*aligned, **kwargs)
        return call(*[_align(a, ndim) if type(a) is Batched else a for a in args])

    run.__qualname__ = f"pointwise({op})"
    return run


def _align(x: Batched, ndim: int) -> Tensor:
    """``[n, *shape]`` with axes of size one put in until one sample has ``ndim`` axes."""
    value = x.physical
    missing = ndim + 1 - value.dim()
    if missing == 0:
        return value
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def _align_mixed(args: Any, kwargs: Any, ndim: int) -> tuple[list[Any], dict[str, Any]]:
    """Align where dtypes differ: a program's 0-dim tensor has lost its weak place in type promotion by its sample axis."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    ndim = max([ndim, *(t.dim() for t in tensors)])
    dtype = _promoted(tensors) if any(t.dim() == 0 for t in tensors) else None

    def align(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        value = _align(a, ndim) if type(a) is Batched else a
        # Masks stay masks; everything else takes the dtype that the op would have computed in.
        return value if dtype is None or a.dtype is torch.bool else value.to(dtype)

    return [align(a) for a in args], {k: align(v) for k, v in kwargs.items()}


def _promoted(tensors: list[Tensor]) -> torch.dtype | None:
    """torch's promotion as the program's own shapes have it, or None where nothing needs a cast."""
    tensors = [t for t in tensors if t.dtype is not torch.bool]
    if len({t.dtype for t in tensors}) < 2:
        return None
    # `result_type` looks at shape and dtype alone, so meta tensors of the program's ranks stand for the arguments.
    stand_ins = [torch.empty((1,) * min(t.dim(), 1), dtype=t.dtype, device="meta") for t in tensors]
    total = stand_ins[0]
    for other in stand_ins[1:]:
        total = torch.empty((1,) * max(total.dim(), other.dim()), dtype=torch.result_type(total, other), device="meta")
    return total.dtype
