"""The tensors that a function reaches without being given them."""

from __future__ import annotations

import functools
import gc
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor
from torch._C import _functorch

from per_sample._batched import storage_of

# Containers of more things are not looked through.
_MANY = 10_000


class Reached(NamedTuple):
    """Wrappers of functorch's by id, and the memory of plain tensors."""

    wrappers: dict[int, Tensor]  # kept, so that the ids stay taken
    storages: set[int | None]


def reached(fn: Any) -> Reached:
    """What a function reaches through its closure, globals, defaults and bound objects: all that is found without looking everywhere."""
    found = Reached({}, set())
    seen: set[int] = set()
    waiting = [fn]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if issubclass(type(x), Tensor):
            if _functorch.is_functorch_wrapped_tensor(x):
                found.wrappers[id(x)] = x
            else:
                found.storages.add(storage_of(x))
        else:
            # An object may have its own ideas of what it holds; the list of all is behind this.
            with suppress(Exception):
                waiting += _within(x)
    return found


def everything() -> Reached:
    """All wrappers that there are."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return Reached({id(x): x for x in tensors if _functorch.is_functorch_wrapped_tensor(x)}, set())


def _within(x: Any) -> list[Any]:
    # By `type`, since `isinstance` asks the object, which may have its own ideas.
    kind = type(x)
    if kind is FunctionType:
        cells = [c.cell_contents for c in x.__closure__ or () if not _is_empty(c)]
        used = [x.__globals__[name] for name in x.__code__.co_names if name in x.__globals__]
        return [*cells, *used, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    if kind is MethodType:
        return [x.__self__, x.__func__]
    if issubclass(kind, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if issubclass(kind, (dict, list, tuple, set)):
        return [] if len(x) > _MANY else list(dict.values(x) if issubclass(kind, dict) else x)
    if issubclass(kind, (type, ModuleType)):
        return []
    try:
        own = object.__getattribute__(x, "__dict__")
    except AttributeError:
        return []
    return list(own.values())


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
