"""One run of the function for one batch: lift, call, differentiate. What comes out still holds factors."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from per_sample import _trees as trees
from per_sample._batched import Batched, Context, is_recorded, wrap, wrap_shared
from per_sample._caller import Caller, CallerMode, Restart, captured_wrappers, has_derivative_level
from per_sample._errors import ArgumentError, NotScalarError
from per_sample._factors import Dense, Factor
from per_sample._interpreter import Interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from per_sample._arguments import Arguments
    from per_sample._record import Recorder

T = TypeVar("T")

_TRACING = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """Every sample's loss and gradients of one batch."""

    ctx: Context
    factors: list[Factor]  # one for each differentiated leaf that is a tensor
    values: Tensor  # [n]
    aux: Any  # tensors [n, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """The function and how it is called."""

    fn: Callable[..., Any]
    kwargs: dict[str, Any]
    has_aux: bool
    keep_batch_dim: bool
    randomness: str


def run(program: Program, arguments: Arguments, leaves: list[Any], n: int, recorder: Recorder | None = None) -> Outcome:
    """Run the function once for ``n`` samples and differentiate."""

    def body(ctx: Context) -> tuple[list[Factor], Any, Any]:
        inputs, targets = _lift(arguments, leaves, ctx, program.keep_batch_dim)
        kwargs = trees.map(lambda x: lift(x, None, ctx) if isinstance(x, Tensor) else x, program.kwargs)
        out = program.fn(*trees.unflatten(arguments.spec, inputs), **kwargs)
        loss, aux = split_aux(out, program.has_aux)
        check_scalar(loss, program.keep_batch_dim)
        return differentiate(loss, targets, ctx), loss, aux

    tensors = [x for x in trees.flatten((leaves, program.kwargs))[0] if isinstance(x, Tensor)]
    ctx, (factors, loss, aux) = in_context(body, program.fn, tensors, n, program.randomness, recorder)
    return Outcome(ctx, factors, read_out(loss, ctx), trees.map(lambda x: read_out(x, ctx), aux))


def in_context(
    body: Callable[[Context], T], fn: Any, tensors: list[Tensor], n: int, randomness: str, recorder: Recorder | None = None
) -> tuple[Context, T]:
    """Run ``body`` in surroundings where every op of ``fn`` comes to the interpreter."""
    grad_mode = torch.is_grad_enabled()
    # Where another transform runs around this one, its tensors must not look like this one's.
    depth = sum(isinstance(mode, Interpreter) for mode in _get_current_dispatch_mode_stack())
    below_functorch = _functorch.peek_interpreter_stack() is not None
    differentiates = (
        torch.autograd.forward_ad._current_level >= 0
        or (grad_mode and any(is_recorded(t) for t in tensors))
        or (below_functorch and has_derivative_level())
    )
    keeps_caller = differentiates or below_functorch or torch.is_inference_mode_enabled() or depth > 0
    tracing = torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(k) is not None for k in _TRACING)
    restores = random_states(tensors) if randomness != "error" and not tracing else []
    copies = False
    while True:
        ctx = Context(n, randomness, grad_mode=grad_mode, functional=keeps_caller or tracing, recorder=recorder)
        ctx.simple = recorder is None and not keeps_caller
        ctx.copies, ctx.depth = copies, depth
        try:
            with _inside(ctx, fn, keeps_caller, differentiates):
                out = body(ctx)
            if ctx.restart is not None:
                raise ctx.restart
        except Restart as restart:
            if restart.ctx is not ctx:
                raise
            copies |= restart.copies
            if not restart.copies:
                keeps_caller = differentiates = True
            for restore in restores:
                restore()
            continue
        finally:
            ctx.forget()
        return ctx, out


@contextmanager
def _inside(ctx: Context, fn: Any, keeps_caller: bool, differentiates: bool) -> Iterator[None]:
    """No functorch levels, autograd on, every op seen by the interpreter."""
    with ExitStack() as context:
        if keeps_caller:
            captured = captured_wrappers(fn) if _functorch.peek_interpreter_stack() is not None else set()
            stack = context.enter_context(temporarily_clear_interpreter_stack())
            ctx.caller = Caller(stack, ctx.grad_mode, differentiates)
            context.enter_context(CallerMode(ctx, captured))
            context.enter_context(torch.inference_mode(False))
        context.enter_context(torch.enable_grad())
        context.enter_context(Interpreter(ctx))
        yield


def _lift(arguments: Arguments, leaves: list[Any], ctx: Context, keep_batch_dim: bool) -> tuple[list[Any], list[Tensor]]:
    """What fn receives, and the leaves to differentiate."""
    inputs: list[Any] = []
    targets: list[Tensor] = []
    for leaf, dim, diff in zip(leaves, arguments.dims, arguments.diff, strict=True):
        if not isinstance(leaf, Tensor):
            inputs.append(leaf)
            continue
        lifted = lift(leaf, dim, ctx)
        if diff:
            targets.append(lifted.requires_grad_())
        inputs.append(lifted.unsqueeze(0) if dim is not None and keep_batch_dim else lifted)
    return inputs, targets


def lift(leaf: Tensor, dim: int | None, ctx: Context) -> Batched:
    """A tensor of the caller's as the program sees it; ``dim`` is its sample axis, None where the samples share it."""
    value = leaf
    if ctx.caller is None:
        if leaf.requires_grad:
            value = leaf.detach()
        if leaf.is_complex() or leaf.is_neg():
            # Below autograd nobody would resolve a lazy conjugation.
            value = value.resolve_conj().resolve_neg()
        if dim:
            value = value.movedim(dim, 0)
        if ctx.copies and dim is not None:
            value = value.clone()
    else:
        value = ctx.caller.enter(value)
    if ctx.caller is not None and dim is not None and (dim or ctx.copies):
        with ctx.caller(in_dispatch=False):
            value = value.movedim(dim, 0)
            if ctx.copies:
                value = value.clone()
    ctx.borrow(leaf)
    return wrap_shared(ctx, value) if dim is None else wrap(ctx, value)


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """The loss and the auxiliary values in what fn returned."""
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise ArgumentError(f"With `has_aux=True`, `fn` must return a pair (loss, aux); it returned {type(out).__name__}.")
    return out


def check_scalar(loss: Any, keep_batch_dim: bool) -> None:
    """Raise ``NotScalarError`` unless the loss is one real number for one sample."""
    if not isinstance(loss, Tensor):
        hint = " Pass `has_aux=True` if it returns (loss, aux)." if isinstance(loss, tuple) and len(loss) == 2 else ""
        raise NotScalarError(f"`fn` must return a scalar tensor, the loss of one sample; it returned {type(loss).__name__}.{hint}")
    if loss.dim() != 0:
        hint = (
            "Reduce it (`.sum()`, `.mean()`)."
            if keep_batch_dim
            else "`fn` sees ONE sample, without a batch axis: reduce the result (`.sum()`), or, if `fn` calls a module that wants a "
            "batch axis, pass `keep_batch_dim=True`."
        )
        raise NotScalarError(f"`fn` must return a scalar loss for one sample; it returned shape {list(loss.shape)}. {hint}")
    if not loss.is_floating_point():
        raise NotScalarError(f"`fn` must return a real floating-point loss; it returned dtype {loss.dtype}.")


def differentiate(loss: Tensor, targets: list[Tensor], ctx: Context) -> list[Factor]:
    """Every sample's gradient of the loss, a factor for each target."""
    if not targets:
        return []
    if not loss.requires_grad:
        return [_factor(None, target, ctx) for target in targets]
    ctx.backward = True
    with nullcontext() if ctx.caller is None else ctx.caller.backward_pass():
        grads = torch.autograd.grad(loss, targets, allow_unused=True)
    return [_factor(grad, target, ctx) for grad, target in zip(grads, targets, strict=True)]


def _factor(grad: Tensor | None, target: Tensor, ctx: Context) -> Factor:
    """The gradient as a factor; a leaf that fn does not use has a gradient of zeros."""
    if grad is None:
        return Dense(torch.zeros((ctx.n, *target.shape), dtype=target.dtype, device=target.device))
    if type(grad) is Batched and grad.ctx is ctx and grad.factor is not None:
        return grad.factor
    return Dense(read_out(grad, ctx))


def read_out(x: Any, ctx: Context) -> Any:
    """A value of the program as the caller sees it, ``[n, ...]``; what all samples share is expanded."""
    if not isinstance(x, Tensor):
        return x
    if type(x) is Batched and x.ctx is ctx:
        if not x.shared:
            return x.physical
        x = x.physical
    else:
        x = x.detach() if not ctx.grad_mode else x
    return x.expand(ctx.n, *x.shape)


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
