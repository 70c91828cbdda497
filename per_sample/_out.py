"""Ops with ``out=``: the same op without it, whose result is then copied."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload

from per_sample._errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


def is_out_form(op: OpOverload) -> bool:
    """Whether the op writes its results into keyword arguments."""
    return any(_is_out(a) for a in op._schema.arguments)


def _is_out(argument: Any) -> bool:
    return argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write


@functools.cache
def _functional(op: OpOverload) -> OpOverload | None:
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments if not _is_out(a)]
    packet = op.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        if [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other
    return None


def run(dispatch: Callable[..., Any], op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """The op, and its results copied to where they are wanted; ``dispatch(op, args, kwargs)`` runs an op."""
    plain = _functional(op)
    if plain is None:
        raise UnsupportedError(f"`{op}` with `out=` is not supported on per-sample tensors; use the form that returns its result.")
    names = [a.name for a in op._schema.arguments if _is_out(a)]
    targets = [kwargs[name] for name in names]
    found = dispatch(plain, args, {k: v for k, v in kwargs.items() if k not in names})
    for target, value in zip(targets, found if isinstance(found, (tuple, list)) else (found,), strict=True):
        if target.shape != value.shape:
            raise UnsupportedError(
                f"`{op}`: `out` has shape {list(target.shape)}, the result {list(value.shape)}; `out` is not resized here."
            )
        if not torch.can_cast(value.dtype, target.dtype):
            raise UnsupportedError(f"`{op}`: the result is of {value.dtype}, which `out` of {target.dtype} cannot hold.")
        dispatch(aten.copy_.default, (target, value), {})
    return targets[0] if len(targets) == 1 else tuple(targets)
