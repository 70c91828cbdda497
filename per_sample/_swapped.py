"""A module with other tensors in place of its own: for one call, or, inside a transform, until the backward pass is over.

A checkpointed part of the module runs again in the backward pass, and must then find what it found the first time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from per_sample._batched import Batched, Context
from per_sample._errors import SharedWriteError
from per_sample._fsdp import hooks_off
from per_sample._interpreter import Interpreter
from per_sample._write_back import state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other tensors, by name; what it assigns to its buffers is undone, or refused if it differs between samples."""
    ctx = _running()
    with ExitStack() as here:
        if ctx is None:
            here.enter_context(_exchanged(module, tensors))
        elif module not in ctx.modules:
            ctx.modules[module] = dict(tensors)
            ctx.ends.append(_entered(_exchanged(module, tensors)))
        elif not _same(ctx.modules[module], tensors):
            here.enter_context(_exchanged(module, tensors))
        before = _buffers(module)
        yield
        for name, new in _put_back(before):
            if type(new) is Batched and not new.shared:
                raise SharedWriteError(
                    f"The module assigns a value that differs between samples to its buffer {name!r}, which they share. Return the value "
                    "with `has_aux=True`, and update the buffer outside."
                )


def names_in_place(module: nn.Module) -> set[str] | None:
    """The names under which other tensors are in place now."""
    ctx = _running()
    return None if ctx is None or module not in ctx.modules else set(ctx.modules[module])


def _running() -> Context | None:
    """The transform that runs here, if nothing of torch.func's runs inside of it: such a one's tensors do not outlive it."""
    if torch.compiler.is_dynamo_compiling() or _functorch.peek_interpreter_stack() is not None:
        return None
    running = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Interpreter)]
    return running[-1].ctx if running else None


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


def _entered(context: AbstractContextManager[None]) -> Any:
    """What leaves the context."""
    stack = ExitStack()
    stack.enter_context(context)
    return stack.close


@contextmanager
def _exchanged(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    own = state_of(module)
    # By identity, since a tied tensor has one name and several places.
    others = {id(own[name]): x for name, x in tensors.items()}
    tables: list[dict[str, Any]] = [table for m in module.modules() for table in (m._parameters, m._buffers) if table]
    places = [(table, name, x) for table in tables for name, x in table.items() if id(x) in others]
    buffers = _buffers(module)
    for table, name, x in places:
        table[name] = others[id(x)]
    try:
        with hooks_off(module):
            yield
    finally:
        _put_back(buffers)
        for table, name, x in places:
            table[name] = x


def _buffers(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]


def _put_back(before: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, Any]]:
    """Undo what was assigned; the names and what had been assigned to them."""
    changed = [(table, name, table[name], old) for table, own in before for name, old in own.items() if table.get(name) is not old]
    for table, name, _, old in changed:
        table[name] = old
    return [(name, new) for _, name, new, _ in changed]
