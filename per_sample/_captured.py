"""The tensors that a function reaches without being given them."""

from __future__ import annotations

import functools
from collections import deque
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor
from torch._C import _functorch

from per_sample._batched import storage_of


class Reached(NamedTuple):
    """Wrappers of functorch's by id, and the memory of plain tensors."""

    wrappers: set[int]
    storages: set[int | None]


def reached(fn: Any) -> Reached:
    """What a function reaches through its closure, globals, defaults and bound objects."""
    found = Reached(set(), set())
    seen: set[int] = set()
    waiting = [fn]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            if _functorch.is_functorch_wrapped_tensor(x):
                found.wrappers.add(id(x))
            else:
                found.storages.add(storage_of(x))
        elif isinstance(x, FunctionType):
            waiting += [c.cell_contents for c in x.__closure__ or () if not _is_empty(c)]
            names = _names(x.__code__)
            used = [x.__globals__[name] for name in names if name in x.__globals__]
            waiting += used
            # Of a module or a class what the function names.
            owners = [vars(owner) for owner in used if isinstance(owner, (type, ModuleType))]
            waiting += [owner[name] for owner in owners for name in names if name in owner]
            waiting += x.__defaults__ or ()
            waiting += (x.__kwdefaults__ or {}).values()
        elif isinstance(x, MethodType):
            waiting += [x.__self__, x.__func__]
        elif isinstance(x, functools.partial):
            waiting += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, (dict, MappingProxyType)):
            waiting += x.values()
        elif isinstance(x, (list, tuple, set, deque)):
            waiting += x
        elif hasattr(x, "__dict__") and not isinstance(x, (type, ModuleType)):
            waiting += vars(x).values()
        elif hasattr(type(x), "__slots__"):
            waiting += [getattr(x, name, None) for name in type(x).__slots__ if isinstance(name, str)]
    return found


def _names(code: CodeType) -> set[str]:
    """The names that a function uses, and those that the functions in it use."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
