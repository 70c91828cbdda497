"""A module with other tensors in place of its own while it is called, and while a checkpointed part of that call runs again."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointFunction

from per_sample._batched import Batched
from per_sample._errors import SharedWriteError, UnsupportedError
from per_sample._fsdp import hooks_off
from per_sample._interpreter import Interpreter
from per_sample._write_back import state_of

if TYPE_CHECKING:
    from types import FrameType

# A module is exchanged for all threads, so that they take turns.
TURN = threading.RLock()
_ENGINE = threading.RLock()
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


class Exchange:
    """One call's tensors in a module."""

    def __init__(self, module: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        # By identity, since a tied tensor has one name and several places.
        others = {id(own[name]): x for name, x in tensors.items()}
        tables: list[dict[str, Any]] = [table for m in module.modules() for table in (m._parameters, m._buffers) if table]
        self.module = module
        self.places = [Place(table, name, others[id(x)]) for table in tables for name, x in table.items() if id(x) in others]
        self.tables = {id(table) for table in tables}
        self.news = {(id(place.table), place.name): place.new for place in self.places}
        self.key = (id(module), *((*key, id(new)) for key, new in self.news.items()))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """This thread's turn, of which the engine's threads make use."""
        with TURN:
            _HELD.append(self)
            try:
                yield
            finally:
                _HELD.remove(self)

    @contextmanager
    def held(self, unclear: Collection[tuple[int, str]] = ()) -> Iterator[None]:
        """The module with these tensors, for the time of a backward pass; at places that are ``unclear`` with none that can be used."""
        places = [place._replace(new=_UNCLEAR) if (id(place.table), place.name) in unclear else place for place in self.places]
        with self.turn(), _exchanged(self.module, places) as assigned:
            yield
        _refuse_assigned(assigned)

    @contextmanager
    def watched(self) -> Iterator[dict[str, Any]]:
        """The same for a call, and for what runs again of it, in which there may be checkpoints, too."""
        with _exchanged(self.module, self.places) as assigned, _Checkpoints(self):
            yield assigned


class _Unclear(Tensor):
    """Stands where a module has been called with different tensors, and nobody could tell which of them is meant."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UnsupportedError(
            "A module that was called with several sets of parameters is called or looked at in the backward pass, by a custom function: "
            "nobody can tell with which. Call `functional` of a copy of the module for each set."
        )


_UNCLEAR = torch.empty(0).as_subclass(_Unclear)


def _refuse_assigned(assigned: Mapping[str, Any]) -> None:
    for name, new in assigned.items():
        if type(new) is Batched and not new.shared:
            raise SharedWriteError(
                f"The module assigns a value that differs between samples to its buffer {name!r}, which they share. Return the value "
                "with `has_aux=True`, and update the buffer outside."
            )


# Those under way in calls and backward passes, for which the thread that waits has the turn.
_HELD: list[Exchange] = []


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
        exchange = Exchange(module, own, tensors)
        ctx = next((mode.ctx for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, Interpreter)), None)
        if ctx is None:
            with exchange.turn(), exchange.watched() as assigned:
                yield
        else:
            exchange = ctx.again.setdefault(exchange.key, exchange)
            # A per-sample tensor of an enclosing call's is differentiated wherever it is used.
            others = {id(own[name]): name for name in tensors if type(own[name]) is not Batched}
            replaced, ctx.replaced = ctx.replaced, {**ctx.replaced, **others}
            try:
                with exchange.turn(), exchange.watched() as assigned:
                    yield
            finally:
                ctx.replaced = replaced
        _refuse_assigned(assigned)


def by_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by one name for each place where they stand: torch's own would not put back what a shared submodule had.

    Buffers, too: what is assigned to them is undone.
    """
    given = {**dict(module.named_buffers()), **tensors}
    names = {x: name for name, x in (*module.named_parameters(), *module.named_buffers())}
    found = {}
    for prefix, m in module.named_modules():
        for name, x in (
            *m.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *m.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ):
            if names[x] in given:
                found[name] = given[names[x]]
    return found


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
        # By weak references a recurrent layer knows whether its list is still that of its weights.
        if before.get(name) is not value and any(type(x() if type(x) is weakref.ref else x) is Batched for x in made):
            if name in before:
                now[name] = before[name]
            elif not isinstance(value, list):
                # It is no longer what it was when the call is over; whoever asks for it gets an error of Python's instead.
                del now[name]


class _Checkpoints(TorchFunctionMode):
    """Has checkpointed parts run again on the tensors of their first time, wherever and whenever that is."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        # What runs parts again; kept, so that no other takes its number. A checkpoint around all of this is not the module's.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        around = [*_reentrant(), *([] if hooks is None else [_frame_of(hooks[1])])]
        self.seen: dict[int, Any] = {id(holder): holder for holder in around}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.register_hook and callable(args[-1]):
            # It may call the module, or look at it, in a backward pass of the program's own, too.
            args = (*args[:-1], _Again(args[-1], self.exchange))
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
        setattr(holder, name, _Again(getattr(holder, name), self.exchange))


class _Again(NamedTuple):
    """A checkpointed part, the next time, or a hook."""

    first: Callable[..., Any]
    exchange: Exchange

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # On a thread of the engine's own, as for a GPU, the turn is that of the thread which waits for it.
        lock = _ENGINE if self.exchange in _HELD else TURN
        if not lock.acquire(timeout=_SECONDS):
            raise UnsupportedError("A part of a module (a checkpoint, a hook) cannot run again while another thread uses the module.")
        try:
            with self.exchange.watched() as assigned:
                out = self.first(*args, **kwargs)
        finally:
            lock.release()
        _refuse_assigned(assigned)
        return out


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
