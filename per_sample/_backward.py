"""The backward pass of one run: every sample's gradient of each leaf, reduced as soon as it is complete."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from per_sample._batched import Batched, Context, storage_of, wrap, wrap_shared
from per_sample._caller import Restart, refuse_custom_nodes
from per_sample._errors import UnsupportedError, UnusedArgumentWarning
from per_sample._factors import Dense, Factor
from per_sample._interpreter import Interpreter
from per_sample.quantities.leaf import LeafGrads
from per_sample.quantities.precision import operands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Takes the number of a differentiated leaf, every sample's gradient of it (of a jacobian a list of these, one for each output), and whether
# only differentiable ops will do.
Reduce = Callable[[int, Any, bool], Any]

# Below so many numbers the factors of all leaves wait until the backward pass is over: hooks would take more time than the memory is worth.
LARGE = 2**18


@dataclass(frozen=True, eq=False, slots=True)
class Reduced:
    """What became of a gradient during the backward pass."""

    result: Any


def by_output(loss: Tensor, targets: list[Tensor], ctx: Context) -> list[list[Factor]]:
    """Every sample's gradients of each of the function's outputs, a list for each target."""
    outputs = loss.reshape(-1).unbind()
    rows = [differentiate(output, targets, ctx, retain_graph=True) for output in outputs]
    return [[row[i] for row in rows] for i in range(len(targets))]


def differentiate(
    loss: Tensor, targets: list[Tensor], ctx: Context, reduce: Reduce | None = None, *, retain_graph: bool = False
) -> list[Any]:
    """Every sample's gradient of the loss, a factor for each target, or what ``reduce`` made of it if that could be at once."""
    if not targets:
        return []
    if not all(target.requires_grad and target.is_leaf for target in targets):
        raise UnsupportedError(
            "`fn` switched off the gradient of an argument that is differentiated (`requires_grad_(False)`, `detach_()`): use "
            "`x = x.detach()`."
        )
    if not loss.requires_grad:
        _warn_of_unused(ctx.caller is not None and ctx.caller.closed_over)
        ctx.expands = 0
        return [_factor(None, target, ctx) for target in targets]
    ctx.backward = True
    reduced: dict[int, Reduced] = {}
    with nullcontext() if ctx.caller is None else ctx.caller.backward_pass():
        if ctx.accumulates:
            grads: Sequence[Tensor | None] = _accumulated(loss, targets, retain_graph)
        else:
            if reduce is not None and not ctx.functional and not ctx.after and _are_large(targets, ctx.n):
                reduced = reduce_on_arrival(targets, reduce, ctx)
            grads = _gradients(loss, targets, ctx, retain_graph)
    _warn_of_unused(all(grad is None for grad in grads))
    # The program is over: what is made from here on is the transform's own.
    ctx.expands = 0
    pairs = zip(grads, targets, strict=True)
    if any(grads[number] is None for number in reduced):
        raise Restart(ctx, after=True)
    return [reduced.get(number) or _factor(grad, target, ctx) for number, (grad, target) in enumerate(pairs)]


def _warn_of_unused(unused: bool) -> None:
    """Zeros are what `vmap(grad)` returns, and hardly ever what was meant."""
    if unused and not torch.compiler.is_compiling():
        warnings.warn(
            "All gradients are zero: `fn` uses nothing that it is differentiated with respect to, but a tensor from outside that requires "
            "grad. If that is a module's parameter, call the module by `functional(module, loss_fn)`, or `torch.func.functional_call`.",
            UnusedArgumentWarning,
            stacklevel=2,
        )


def _are_large(targets: list[Tensor], n: int) -> bool:
    """Whether what gradients take is worth a hook for each leaf."""
    return n * sum(target.numel() for target in targets) > LARGE


def reduce_on_arrival(targets: list[Tensor], reduce: Reduce, ctx: Context) -> dict[int, Reduced]:
    """Have ``reduce`` called when the last contribution to a leaf's gradient has arrived; the results, by leaf, come with time.

    What goes on in its place takes no memory, so that a factor and the activations it holds are gone before the next one is made.
    """
    reduced: dict[int, Reduced] = {}

    def watch(number: int, nothing: Tensor) -> Callable[[Tensor], Tensor | None]:
        def arrived(grad: Tensor | None) -> Tensor | None:
            if grad is None or type(_get_current_dispatch_mode()) is not Interpreter:
                return None  # zero whatever the samples are, or inside a mode of the program's own: later
            if number in reduced:
                # The program differentiates inside the backward pass, and this was only a part.
                raise Restart(ctx, after=True)
            factor = _held(grad, ctx)
            # The engine runs without grad mode; what the gradients meet (weights, a direction) may want it.
            with outside(), torch.set_grad_enabled(ctx.grad_mode):
                reduced[number] = Reduced(reduce(number, factor, ctx.functional))
            ctx.held.update(_held_storages(reduced[number].result))
            if isinstance(factor, Dense):
                ctx.watch(factor.value)
            return wrap_shared(ctx, nothing)

        return arrived

    for number, target in enumerate(targets):
        with outside():
            nothing = torch.zeros((), dtype=target.dtype, device=target.device).expand(target.shape)
        target.register_hook(watch(number, nothing))
    return reduced


def _held_storages(result: Any) -> set[int | None]:
    """The memory of the tensors and operands that a result keeps."""
    if isinstance(result, Tensor):
        return {storage_of(result)}
    if isinstance(result, LeafGrads):
        return {storage_of(x) for x in operands(result.factor)}
    if isinstance(result, (tuple, list)):
        return {storage for x in result for storage in _held_storages(x)}
    return set()


@contextmanager
def outside() -> Iterator[None]:
    """Where neither the interpreter nor the program's function modes see what is done."""
    mode = _pop_mode()
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        _push_mode(mode)


def _gradients(loss: Tensor, targets: list[Tensor], ctx: Context, retain_graph: bool) -> Sequence[Tensor | None]:
    # Some of torch's formulas take what the forward pass saved, which the caller could not differentiate, unless grad mode is on.
    again = ctx.caller is not None and ctx.caller.differentiates
    if again:
        refuse_custom_nodes(loss)
    try:
        return torch.autograd.grad(loss, targets, allow_unused=True, create_graph=again, retain_graph=retain_graph or again)
    except RuntimeError as err:
        if "incompatible with .grad()" in str(err):
            raise Restart(ctx, accumulates=True) from err
        raise


def _accumulated(loss: Tensor, targets: list[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """Reentrant checkpoints differentiate inside the backward pass, and only ``backward`` has room for what they find."""
    # Autograd writes later contributions into the first one, of which there must be no views.
    hooks = [target.register_hook(_alone) for target in targets]
    torch.autograd.backward(loss, retain_graph=retain_graph)
    for hook in hooks:
        hook.remove()
    found = [target.grad for target in targets]
    for target in targets:
        target.grad = None
    return found


def _alone(grad: Tensor) -> Tensor:
    """A gradient with memory of its own."""
    if type(grad) is not Batched or grad.shared:
        return grad
    with outside(), nullcontext() if grad.ctx.caller is None else grad.ctx.caller(in_dispatch=False):
        return wrap(grad.ctx, grad.physical.clone())


def _factor(grad: Tensor | None, target: Tensor, ctx: Context) -> Factor:
    """The gradient as a factor; a leaf that fn does not use has a gradient of zeros."""
    if grad is None:
        return Dense(torch.zeros((), dtype=target.dtype, device=target.device).expand(ctx.n, *target.shape))
    return _held(grad, ctx)


def _held(grad: Tensor, ctx: Context) -> Factor:
    """The form in which a gradient is held."""
    grad = unwrap_if_dead(grad)
    if type(grad) is Batched and grad.ctx is ctx and grad.factor is not None:
        return grad.factor
    if ctx.caller is None:
        return Dense(read_out(grad, ctx))
    # What the caller has is his here, and no tensor from outside of the program.
    with torch._C.DisableTorchFunction(), ctx.caller(in_dispatch=False):
        return Dense(read_out(grad, ctx))


def read_out(x: Any, ctx: Context) -> Any:
    """A value of the program as the caller sees it, ``[n, ...]``; what all samples share is expanded."""
    if not isinstance(x, Tensor):
        return x
    # A `torch.func.vjp` of the program's own leaves its wrapper on what it has returned.
    x = unwrap_if_dead(x)
    if type(x) is Batched and x.ctx is ctx:
        if not x.shared:
            return x.physical
        x = x.physical
    else:
        x = x.detach() if not ctx.grad_mode else x
    return x.expand(ctx.n, *x.shape)
