"""The caller's context: what surrounds a transform and must see every physical op (functorch levels, autograd)."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from contextlib import ExitStack, contextmanager
from types import CodeType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.utils.hooks
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from per_sample._batched import Batched, is_recorded, storage_of, wrap_shared
from per_sample._errors import UnsupportedError, UnusedArgumentWarning
from per_sample._keys import all_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from per_sample._batched import Context
    from per_sample._captured import Reached


def has_derivative_level() -> bool:
    """Whether a functorch level above takes derivatives."""
    derivative = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return any(level.key() in derivative for level in retrieve_all_functorch_interpreters())


class Restart(BaseException):
    """The call begins again, for a reason that showed on the way.

    ``copies``: the program writes in place into its arguments, which it must get as copies (see ``Context``).
    ``expands``: it writes a per-sample value into a tensor of its own making, which every sample must get for itself (see ``Context``).
    ``functions``: some of its calls have to be caught before the dispatcher sees them.
    ``constants``: it writes into arguments that are not differentiated, but recorded by the caller.
    ``scans``: it has a tensor of which only a list of all can tell to which transform it belongs.
    ``accumulates``: it holds a reentrant checkpoint, which wants `backward` instead of `autograd.grad`.
    ``groups``: samples (their numbers) that have to run apart.
    None of these: a closed-over tensor turned out to require grad, and the caller's context must be kept.
    """

    def __init__(self, ctx: Context, *, groups: list[list[int]] | None = None, **needs: int) -> None:
        super().__init__()
        self.ctx = ctx
        self.groups = groups
        # Fields of the next run's ``Context``.
        self.needs = needs
        # So that it is not lost in an `except` of the program's.
        ctx.restart = self


class Caller:
    """The surroundings of one call: the functorch stack above it and its grad mode."""

    def __init__(self, stack: list[Any], grad_mode: bool, differentiates: bool) -> None:
        self.stack = stack
        self.grad_mode = grad_mode
        self.differentiates = differentiates
        # Backward passes under way of this transform or of one inside it, as opposed to an `autograd.grad` of the program's.
        self.backward_passes = 0
        self.enclosing: list[CallerMode] = []
        # Physical ops are under way, whose tensors are the caller's own.
        self.inside = 0
        # The program detaches a tensor, as opposed to autograd, which does so with what it saves.
        self.detaches = 0
        # A leaf that requires grad came from outside the function.
        self.closed_over = False

    @contextmanager
    def __call__(self, *, in_dispatch: bool = True) -> Iterator[None]:
        """Run physical ops where the caller stands, so that its levels see them.

        ``in_dispatch``: called from inside ``__torch_dispatch__``, where the keys above it are switched off.
        """
        in_engine = self.backward_passes > 0 and torch._C._current_graph_task_id() != -1
        # The engine turns grad mode off in a backward pass; only what the user turned off inside fn counts.
        enabled = torch.is_grad_enabled()
        if not enabled and not in_engine and self.differentiates:
            _refuse_custom_function()
            _refuse_saved_tensor_hooks()
        with ExitStack() as context:
            if in_dispatch:
                context.enter_context(all_keys())
            if self.stack:
                context.enter_context(temporarily_restore_interpreter_stack(self.stack))
            context.enter_context(torch.set_grad_enabled(self.grad_mode and (enabled or in_engine)))
            self.inside += 1
            try:
                yield
            finally:
                self.inside -= 1

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """The engine runs for the transform, so that what it switches off does not count."""
        callers = [self, *(mode.ctx.caller for mode in self.enclosing if mode.ctx.caller is not None)]
        for caller in callers:
            caller.backward_passes += 1
        try:
            yield
        finally:
            for caller in callers:
                caller.backward_passes -= 1

    def enter(self, x: Tensor) -> Tensor:
        """A tensor as the transforms around this one have it: a closed-over one of theirs is lifted there first."""
        for mode in self.enclosing:
            x = mode._own(x, certain=False)
        return x


# A Python function up to torch 2.14, on whose stack a custom function's own is then found.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


def _refuse_custom_function() -> None:
    """Inside ``Function.apply`` the caller would differentiate the forward's body instead of the custom rule."""
    bodies = _custom_forwards()
    frame = sys._getframe(1)
    while frame is not None:
        name = bodies.get(frame.f_code)
        if frame.f_code is _APPLY:
            name = getattr(frame.f_locals.get("cls"), "__name__", "a custom function")
        elif name is not None and name.startswith("GeneratedBackwardFor_"):
            name = str(frame.f_locals.get("op", name))  # one body for all ops of `torch.library`
        if name is not None:
            _refuse(name)
        frame = frame.f_back  # type: ignore[assignment]


def _refuse_saved_tensor_hooks() -> None:
    """What such a hook makes of a tensor, without grad mode, has that tensor's history for autograd here, and none for the caller."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return
    pack = inspect.unwrap(hooks[0].func if isinstance(hooks[0], functools.partial) else hooks[0])
    code = getattr(pack, "__code__", None) or getattr(type(pack).__call__, "__code__", None)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            raise UnsupportedError(
                "Hooks on saved tensors (`saved_tensors_hooks`, `save_on_cpu`) change them, and the per-sample gradients are being "
                "differentiated once more: the outer derivative would miss that. Leave them away, or detach the arguments (or use "
                "torch.no_grad()) where the outer derivative is not wanted."
            )
        frame = frame.f_back  # type: ignore[assignment]


def warn_of_replaced(ctx: Context, x: Any, out: Any = None) -> None:
    """A module's own tensor, used although the module has another one for this call; ``out``: what came of it, if that is known."""
    if id(x) in ctx.replaced:
        with torch._C.DisableTorchFunction():
            if out is not None and not any(isinstance(y, Tensor) and y.requires_grad for y in torch.utils._pytree.tree_leaves(out)):
                return
        warnings.warn(
            f"The module uses its parameter {ctx.replaced[id(x)]!r} by another way than its attribute (a list, a closure), where nobody "
            "can exchange it: the gradients lack that use of it.",
            UnusedArgumentWarning,
            stacklevel=2,
        )


def refuse_custom_nodes(loss: Tensor) -> None:
    """The same for a custom function that runs no op of its own in ``forward``, which later versions show in the graph alone."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            _refuse(type(node).__name__.removesuffix("Backward"))
        waiting += [following for following, _ in node.next_functions]


def _refuse(name: str) -> NoReturn:
    raise UnsupportedError(
        f"`{name}` has a `backward` of its own (a torch.autograd.Function, or an op's `register_autograd`), and the per-sample gradients "
        "are being differentiated once more: the outer derivative would ignore it. Write it with differentiable torch ops, or detach the "
        "arguments (or use torch.no_grad()) where the outer derivative is not wanted."
    )


def _custom_forwards() -> dict[CodeType, str]:
    """The names of all custom functions by the code of their ``forward``, which is all of them that a stack shows in later versions.

    The function of a module's backward hooks runs no op of its own in ``forward``, so it is known by who calls it.
    """
    found = {torch.utils.hooks.BackwardHook._apply_on_tensors.__code__: "BackwardHookFunction"}
    waiting: list[Any] = [torch.autograd.Function]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        body = getattr(inspect.unwrap(cls.forward), "__code__", None)
        if body is not None and cls.forward is not torch.autograd.Function.forward:
            found.setdefault(body, cls.__name__)  # a class before those that inherit from it
    return found


_DEAD = -2

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_DETACH = {torch.Tensor.detach, torch.detach, torch.Tensor.detach_, torch.detach_, _DATA}


# Functions whose backward torch takes apart for forward derivatives, with a detach of which no function mode hears.
_DECOMPOSED = {getattr(place, name) for place in (torch, torch.nn.functional) for name in ("layer_norm", "instance_norm")}


def _is_forward_over_reverse() -> bool:
    keys = {level.key() for level in retrieve_all_functorch_interpreters()}
    return {_functorch.TransformType.Grad, _functorch.TransformType.Jvp} <= keys


class CallerMode(TorchFunctionMode):
    """Sees what the dispatcher cannot tell: detaches written by the user, and closed-over functorch tensors."""

    def __init__(self, ctx: Context, captured: Reached) -> None:
        super().__init__()
        self.ctx = ctx
        self.captured = captured
        self.lifted: dict[int, tuple[Tensor, Batched]] = {}
        assert ctx.caller is not None
        ctx.caller.enclosing = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, CallerMode)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = torch.utils._pytree.arg_tree_leaves(*args, **kwargs) if self.ctx.replaced else []
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._lift, (args, kwargs))
        caller = self.ctx.caller
        assert caller is not None
        if func not in _DETACH:
            if func in _DECOMPOSED and caller.differentiates and _is_forward_over_reverse():
                raise UnsupportedError(
                    f"`{func.__name__}` below a forward derivative of a gradient (`jvp(grad)`, `hessian`), and the per-sample gradients "
                    "are being differentiated once more: torch detaches parts of it there. Use `grad(grad(...))`, `jacrev(jacrev(...))`."
                )
            out = func(*args, **kwargs)
            for x in given:
                warn_of_replaced(self.ctx, x, out)
            return out
        caller.detaches += 1
        try:
            out = func(*args, **kwargs)
        finally:
            caller.detaches -= 1
        if out is args[0] and type(out) is Batched and out.ctx is self.ctx:
            # In place, of which the dispatcher does not hear.
            with caller(in_dispatch=False):
                out._value = out.physical.detach()
        return out

    def _lift(self, x: Tensor) -> Tensor:
        """A closed-over tensor of the caller's as a shared one; those of the transforms around this one get theirs first."""
        assert self.ctx.caller is not None
        x = self.ctx.caller.enter(x)
        # Inside a functorch transform of the program's own, its wrappers look like the caller's.
        return self._own(x, certain=_functorch.peek_interpreter_stack() is None)

    def _own(self, x: Tensor, *, certain: bool) -> Tensor:
        caller = self.ctx.caller
        assert caller is not None
        # Reading `x.requires_grad` is a torch function, too.
        with torch._C.DisableTorchFunction():
            if caller.inside or (type(x) is Batched and x.ctx.depth >= self.ctx.depth) or not self._is_the_callers(x, caller, certain):
                return x
            if id(x) not in self.lifted:
                # The pair is kept, so that the id stays taken.
                self.ctx.borrow(x)
                recorded = self.ctx.grad_mode and is_recorded(x)
                # Outside of the transforms of the program's own, which would not have it.
                lifted = wrap_shared(self.ctx, x)
                with temporarily_clear_interpreter_stack():
                    lifted.requires_grad_(recorded)
                self.lifted[id(x)] = (x, lifted)
                caller.differentiates |= recorded
                caller.closed_over |= x.requires_grad and x.grad_fn is None
            return self.lifted[id(x)][1]

    def _is_the_callers(self, x: Tensor, caller: Caller, certain: bool) -> bool:
        if _functorch.is_functorch_wrapped_tensor(x):
            # What a `vjp` of the program's own leaves behind when it is over; the caller's levels live as long as this runs.
            if _functorch.maybe_get_level(x) == _DEAD:
                return False
            return bool(caller.stack) and (certain or id(x) in self.captured.wrappers or self._is_from_outside(x))
        if type(x) is not Batched and x.is_inference():
            return True
        # What the caller's autograd records must not be touched by ops of its own: a backward pass would run them unrecorded.
        return x.requires_grad and self.ctx.grad_mode and storage_of(x) not in self.ctx.born

    def _is_from_outside(self, x: Tensor) -> bool:
        """Whether a wrapper that is in use below a transform of the program's own is not of that one: it was there before the program."""
        if self.ctx.scans:
            return False
        base, constant = x, True
        while _functorch.is_functorch_wrapped_tensor(base):
            # The transforms around may have one of the same memory, which is none to them.
            constant &= not (_functorch.is_batchedtensor(base) or base.requires_grad)
            base = _functorch.get_unwrapped(base)
        own = type(base) is Batched and base.ctx.depth >= self.ctx.depth
        if own or storage_of(base) in self.ctx.born or (constant and storage_of(base) in self.captured.storages):
            return False
        raise Restart(self.ctx, scans=1)
