"""Where a function runs: a context whose ops all come to the interpreter, and the reasons to begin again."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from per_sample._batched import Context, is_recorded
from per_sample._caller import Caller, CallerMode, Restart, has_derivative_level
from per_sample._captured import everything, reached
from per_sample._functions import FunctionMode
from per_sample._interpreter import Interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from per_sample._record import Recorder

T = TypeVar("T")

_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


class Split(Exception):
    """The samples lead different ways: ``groups`` of their numbers have to run apart."""

    def __init__(self, groups: list[list[int]]) -> None:
        super().__init__()
        self.groups = groups


def in_context(
    body: Callable[[Context], T],
    fn: Any,
    tensors: list[Tensor],
    n: int,
    randomness: str,
    recorder: Recorder | None = None,
    needs: dict[str, int] | None = None,
    **settings: bool,
) -> tuple[Context, T]:
    """Run ``body`` in surroundings where every op of ``fn`` comes to the interpreter; ``settings``: more fields of the ``Context``.

    ``needs``: those that ``fn`` is known to need; what shows on the way is added.
    """
    grad_mode = torch.is_grad_enabled()
    # Where another transform runs around this one, its tensors must not look like this one's.
    depth = sum(isinstance(mode, Interpreter) for mode in _get_current_dispatch_mode_stack())
    differentiates = _differentiates(tensors, grad_mode)
    below_functorch = _functorch.peek_interpreter_stack() is not None
    keeps_caller = differentiates or below_functorch or torch.is_inference_mode_enabled() or depth > 0
    tracing = torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(k) is not None for k in _TRACING)
    restores = random_states(tensors) if randomness != "error" and not tracing else []
    recorded = recorder.copy() if recorder is not None else None
    needs = {} if needs is None else needs
    while True:
        ctx = Context(n, randomness, depth, grad_mode=grad_mode, recorder=recorder, **settings, **needs)  # type: ignore[arg-type]
        ctx.functional = keeps_caller or tracing
        ctx.simple = recorder is None and not keeps_caller
        try:
            with _inside(ctx, fn, keeps_caller, differentiates):
                out = body(ctx)
            if ctx.restart is not None:
                raise ctx.restart
        except Restart as restart:
            if restart.ctx is not ctx:
                raise
            for restore in restores:
                restore()
            if recorder is not None:
                recorder.begin_again(recorded, tuple(restart.needs) if restart.groups is None else None)
                recorded = recorder.copy()
            if restart.groups is not None:
                raise Split(restart.groups) from None
            needs.update({name: max(level, needs.get(name, 0)) for name, level in restart.needs.items()})
            keeps_caller |= not restart.needs
            differentiates |= not restart.needs
        else:
            return ctx, out
        finally:
            ctx.forget()


def _differentiates(tensors: list[Tensor], grad_mode: bool) -> bool:
    """Whether the caller will want derivatives of the result."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or (grad_mode and any(is_recorded(t) for t in tensors))
        or (_functorch.peek_interpreter_stack() is not None and has_derivative_level())
    )


@contextmanager
def _inside(ctx: Context, fn: Any, keeps_caller: bool, differentiates: bool) -> Iterator[None]:
    """No functorch levels, autograd on, every op seen by the interpreter."""
    with ExitStack() as context:
        if keeps_caller:
            below = _functorch.peek_interpreter_stack() is not None
            captured = everything() if ctx.scans else reached(fn if below else None)
            stack = context.enter_context(temporarily_clear_interpreter_stack())
            ctx.caller = Caller(stack, ctx.grad_mode, differentiates)
            context.enter_context(CallerMode(ctx, captured))
            context.enter_context(torch.inference_mode(False))
        if ctx.functions:
            context.enter_context(FunctionMode(ctx))
        context.enter_context(torch.enable_grad())
        # Modes that the function left open must not keep this one on the stack.
        foreign: list[Any] = []
        context.callback(lambda: [_push_mode(mode) for mode in reversed(foreign)])  # type: ignore[func-returns-value]
        interpreter = Interpreter(ctx)
        context.enter_context(interpreter)
        try:
            yield
        finally:
            while _get_current_dispatch_mode() not in (interpreter, None):
                foreign.append(_pop_mode())


def random_states(leaves: list[Any]) -> list[Callable[[], None]]:
    """Functions that set the generators of the leaves' devices back, for a run that has to begin again."""
    cpu = torch.get_rng_state()
    restores: list[Callable[[], None]] = [lambda: torch.set_rng_state(cpu)]
    devices = {x.device for x in leaves if isinstance(x, Tensor)}
    for device in (d for d in devices if d.type not in ("cpu", "meta")):
        module = torch.get_device_module(device)
        state = module.get_rng_state(device)
        restores.append(functools.partial(module.set_rng_state, state, device))
    return restores
