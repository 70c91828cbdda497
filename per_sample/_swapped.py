"""A module with other tensors in place of its own while it is called, and while a checkpointed part of that call runs again."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from per_sample._batched import Batched
from per_sample._errors import SharedWriteError, UnsupportedError
from per_sample._fsdp import hooks_off
from per_sample._write_back import state_of

if TYPE_CHECKING:
    from types import FrameType

# A module is exchanged for all threads, so that they take turns.
TURN = threading.RLock()
# A checkpoint may run again on another thread than the one that waits for it.
_SECONDS = 60.0


class Place(NamedTuple):
    """Where a tensor of a module's stands."""

    table: dict[str, Any]
    name: str
    new: Tensor


def turn() -> AbstractContextManager[Any]:
    """Where this thread may look at a module's own tensors."""
    return nullcontext() if torch.compiler.is_dynamo_compiling() else TURN


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other tensors, by name, for this thread's call.

    What the module assigns to buffers meanwhile is undone, or refused if it differs between samples.
    """
    if parametrize._cache_enabled:
        raise UnsupportedError(
            "`parametrize.cached()` keeps weights that were made from other parameters; call the function outside of it."
        )
    with TURN:
        own = state_of(module)
        # By identity, since a tied tensor has one name and several places.
        others = {id(own[name]): x for name, x in tensors.items()}
        tables: list[dict[str, Any]] = [table for m in module.modules() for table in (m._parameters, m._buffers) if table]
        places = [Place(table, name, others[id(x)]) for table in tables for name, x in table.items() if id(x) in others]
        # Hooks and custom functions may call the module in the backward pass.
        contexts = {id(x.ctx): x.ctx for x in others.values() if type(x) is Batched}.values()
        before = [ctx.replaced for ctx in contexts]
        for ctx in contexts:
            ctx.again.append(functools.partial(_held, module, places))
            ctx.replaced = {**ctx.replaced, **{id(own[name]): name for name in tensors}}
        try:
            with _watched(module, places) as assigned:
                yield
        finally:
            for ctx, replaced in zip(contexts, before, strict=True):
                ctx.replaced = replaced
        for name, new in assigned.items():
            if type(new) is Batched and not new.shared:
                raise SharedWriteError(
                    f"The module assigns a value that differs between samples to its buffer {name!r}, which they share. Return the value "
                    "with `has_aux=True`, and update the buffer outside."
                )


@contextmanager
def _watched(module: nn.Module, places: list[Place]) -> Iterator[dict[str, Any]]:
    """The same for what runs again, in which there may be checkpoints, too."""
    with _exchanged(module, places) as assigned, _Checkpoints(functools.partial(_watched, module, places)):
        yield assigned


@contextmanager
def _held(module: nn.Module, places: list[Place]) -> Iterator[None]:
    """The same for the time of a backward pass, after all calls."""
    with TURN:
        now = [place.table[place.name] for place in places]
        if any(type(x) is Batched and x is not place.new for x, place in zip(now, places, strict=True)):
            raise UnsupportedError(
                "A module is called with several sets of parameters, and has hooks on tensors or custom functions, which may call it in "
                "the backward pass: nobody could tell with which. Call `functional` of a copy of the module."
            )
        with _exchanged(module, places):
            yield


@contextmanager
def _exchanged(module: nn.Module, places: list[Place]) -> Iterator[dict[str, Any]]:
    """The places with their new tensors; yields what was assigned to buffers, once that is undone."""
    before = [place.table[place.name] for place in places]
    held = [(vars(m), dict(vars(m))) for m in module.modules()]
    buffers = [(m._buffers, dict(m._buffers)) for m in module.modules()]
    for place in places:
        place.table[place.name] = place.new
        for table, own in buffers:
            if table is place.table:
                own[place.name] = place.new
    assigned: dict[str, Any] = {}
    try:
        with hooks_off(module):
            yield assigned
    finally:
        for table, own in buffers:
            assigned |= {name: new for name, new in table.items() if own.get(name) is not new}
            for name in [name for name, new in table.items() if name not in own and type(new) is Batched]:
                del table[name]
            table.update(own)
        for place, old in zip(places, before, strict=True):
            place.table[place.name] = old
        for now, own in held:
            _forget(now, own)


def _forget(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Put back attributes that were made from the tensors, such as a normalised weight or an LSTM's list of weights."""
    for name, value in list(now.items()):
        made = value if isinstance(value, list) else [value]
        if before.get(name) is not value and any(type(x) is Batched for x in made):
            if name in before:
                now[name] = before[name]
            elif not isinstance(value, list):
                # It is no longer what it was when the call is over; whoever asks for it gets an error of Python's instead.
                del now[name]


class _Checkpoints(TorchFunctionMode):
    """Has checkpointed parts run again on the tensors of their first time, wherever and whenever that is."""

    def __init__(self, again: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.again = again
        # What runs parts again; kept, so that no other takes its number. A checkpoint around all of this is not the module's.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        around = [*_reentrant(), *([] if hooks is None else [_frame_of(hooks[1])])]
        self.seen: dict[int, Any] = {id(holder): holder for holder in around}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook and type(args[0]) is Batched:
            args[0].ctx.hooked = True
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None:
            self._wrap(_frame_of(hooks[1]), "recompute_fn")
        if not torch.is_grad_enabled():
            for holder in _reentrant():
                self._wrap(holder, "run_function")
        return func(*args, **(kwargs or {}))

    def _wrap(self, holder: Any, name: str) -> None:
        # A reentrant one looks at its arguments before it keeps what it runs.
        if id(holder) in self.seen or not hasattr(holder, name):
            return
        self.seen[id(holder)] = holder
        setattr(holder, name, _Again(getattr(holder, name), self.again))


class _Again(NamedTuple):
    """A checkpointed part, the next time."""

    first: Callable[..., Any]
    again: Callable[[], AbstractContextManager[Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not TURN.acquire(timeout=_SECONDS):
            raise UnsupportedError("A checkpointed part of a module cannot run again while another thread uses the module.")
        try:
            with self.again():
                return self.first(*args, **kwargs)
        finally:
            TURN.release()


def _frame_of(unpack: Any) -> Any:
    """What a checkpoint without reentrance runs again, from the hook that it gives to autograd."""
    cells = getattr(unpack, "__closure__", None) or ()
    return next((cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "recompute_fn")), None)


def _reentrant() -> list[Any]:
    """The reentrant checkpoints whose first time this is."""
    found = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _FORWARD:
            found.append(frame.f_locals.get("ctx"))
        frame = frame.f_back
    return found


_FORWARD = CheckpointFunction.forward.__code__
