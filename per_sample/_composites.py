"""Functions that are many ops to the dispatcher, and one op of this library's in each direction.

`F.linear` comes to the interpreter as four ops, and its backward pass as ten more; in small networks that is most of the time. Where
nobody asks for the single ops (no transform around this one, no mode of the program's or the caller's), it is taken as a whole.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch._C import _functorch
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

from per_sample._batched import Batched, wrap, wrap_factor
from per_sample._factors import Outer
from per_sample._kernels import onednn
from per_sample._lists import LISTS
from per_sample._registry import TABLE, on_change
from per_sample._skipped import skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from per_sample._batched import Context


aten = torch.ops.aten
# What a linear layer consists of, and which of it has rules from outside the package: these are to be asked.
_SINGLE = {aten.addmm.default, aten.mm.default, aten.bmm.default, aten.t.default, aten.view.default, aten.sum.dim_IntList}
_replaced: set[OpOverload] = set()


def _note_replaced(op: OpOverload) -> None:
    if op in _SINGLE:
        (_replaced.add if TABLE[op].foreign else _replaced.discard)(op)


on_change(_note_replaced)


@contextmanager
def exchanged(ctx: Context) -> Iterator[None]:
    """Modules have the tensors of the call for its backward pass, too: custom functions may call them or look at them."""
    exchanges = ctx.again.values()
    keys = {key for exchange in exchanges for key in exchange.news}
    # Where they have been called with different tensors; a module's own, where it has no other, is one more.
    unclear = {key for key in keys if len({id(x.news.get(key)) for x in exchanges if key[0] in x.tables}) > 1}
    with ExitStack() as context:
        for exchange in exchanges:
            context.enter_context(exchange.held(unclear))
        yield


# A backward pass of the program's own, in which modules have the tensors of their calls, too.
_BACKWARD = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


class CompositeMode(TorchFunctionMode):
    """Catches functions before torch takes them apart."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx
        self.table = LISTS if ctx.functional else COMPOSITES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        composite = self.table.get(func)
        if composite is not None:
            out = composite(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        if func in _BACKWARD and self.ctx.again:
            with exchanged(self.ctx):
                return func(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


@contextmanager
def composites(ctx: Context) -> Iterator[None]:
    """Where the program runs, so that its functions are caught; modes that it leaves open stay open."""
    own = CompositeMode(ctx)
    overrides._push_mode(own)
    try:
        yield
    finally:
        stack = overrides._get_current_function_mode_stack()
        # A program that closes a mode of its caller's has closed this one in its stead.
        place = stack.index(own) if own in stack else len(stack) - 1
        for _ in stack[place:]:
            overrides._pop_mode()
        for mode in stack[place + 1 :]:
            overrides._push_mode(mode)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear` of per-sample rows and a matrix that the samples share."""
    if type(input) is not Batched or input.shared or not _is_undisturbed(input.ctx, input.device.type):
        return NotImplemented
    shape = input.shape
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)) or 0 in (input.numel(), weight.numel()):
        return NotImplemented
    if not shape or not input.is_floating_point() or weight.dim() != 2 or shape[-1] != weight.shape[1]:
        return NotImplemented
    if not _is_shared_by(input, weight) or (bias is not None and not (_is_shared_by(input, bias) and bias.shape == weight.shape[:1])):
        return NotImplemented
    return Linear.apply(input, weight, bias)


def _is_undisturbed(ctx: Context, device: str) -> bool:
    """Whether nobody but autograd would see the single ops."""
    return (
        _is_alone(ctx, device)
        and not ctx.expands
        and not _replaced
        # A mode of the caller's, around the transform, wants to see the function and what it calls.
        and torch._C._len_torch_function_stack() == 0
        and torch.is_grad_enabled()
        and _functorch.peek_interpreter_stack() is None
        # A checkpoint runs it again in the backward pass, where functions are not caught, and expects the same tensors to be saved.
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and forward_ad._current_level < 0
    )


def _is_alone(ctx: Context, device: str) -> bool:
    """Whether the interpreter is what would see an op next, as it is, and derivatives end with it."""
    if ctx.caller is not None or ctx.functional or (device != "meta" and torch.is_autocast_enabled(device)):
        return False
    return getattr(_get_current_dispatch_mode(), "ctx", None) is ctx


def _is_shared_by(input: Batched, x: Any) -> bool:
    """Whether an operand is the same for all samples, and a derivative of it is nobody's but this transform's."""
    if x.dtype is not input.dtype or x.device != input.device or x.layout is not torch.strided:
        return False
    if type(x) is Batched:
        return x.shared and x.ctx is input.ctx
    return type(x) in (Tensor, torch.nn.Parameter) and not x.requires_grad


class Linear(torch.autograd.Function):
    """`F.linear` as one op forward and one backward."""

    @staticmethod
    def forward(c: Any, input: Batched, weight: Any, bias: Any) -> Any:
        by_input, by_weight, _ = c.needs_input_grad
        c.save_for_backward(input if by_weight else None, weight if by_input else None)
        c.shape = input.shape
        c.set_materialize_grads(False)
        return _below(input.ctx, "aten.linear.default", partial(_product, input, weight, bias))

    @staticmethod
    def backward(c: Any, grad: Any) -> Any:
        if grad is None:
            return None, None, None
        operands = (c.shape, c.needs_input_grad, grad, *c.saved_tensors)
        if type(grad) is not Batched or grad.shared or torch.is_grad_enabled() or not _is_alone(grad.ctx, grad.device.type):
            return _by_single_ops(*operands)
        return _below(grad.ctx, "aten.linear_backward.default", partial(_gradients, *operands))


def _below(ctx: Context, name: str, run: Callable[[], Any]) -> Any:
    """Run physical ops, which do not concern the interpreter."""
    mode = _pop_mode()
    try:
        with torch._C.DisableTorchFunction():
            return _recorded(ctx, name, run)
    finally:
        _push_mode(mode)


def _recorded(ctx: Context, name: str, run: Callable[[], Any]) -> Any:
    return run() if ctx.recorder is None else ctx.recorder.op(name, "rule", run)


def _product(input: Batched, weight: Any, bias: Any) -> Batched:
    value, matrix = input.physical, _physical(weight)
    rows = value.reshape(-1, matrix.shape[1])
    out = onednn.linear(rows, matrix, _physical(bias))
    if out is None:
        out = F.linear(rows, matrix, _physical(bias))
    return wrap(input.ctx, out.view(*value.shape[:-1], matrix.shape[0]))


def _physical(x: Any) -> Any:
    return x.physical if type(x) is Batched else x


def _gradients(shape: tuple[int, ...], wanted: Any, grad: Batched, input: Any, weight: Any) -> tuple[Any, Any, Any]:
    """The input's gradient, the weight's as an ``Outer``, and the bias' as a sum over positions."""
    ctx, g = grad.ctx, grad.physical
    # Three products read it, each of which would copy what does not lie in rows.
    rows = (g if g.stride(-1) == 1 else g.contiguous()).reshape(ctx.n, -1, g.shape[-1])
    by_input = by_weight = by_bias = None
    if wanted[0]:
        by_input = wrap(ctx, (rows.flatten(0, 1) @ _physical(weight)).view(ctx.n, *shape))
    if wanted[1]:
        factor = Outer(rows.transpose(1, 2), input.physical.reshape(ctx.n, -1, shape[-1]))
        by_weight = wrap_factor(ctx, factor) if ctx.backward else wrap(ctx, factor.materialize())
    if wanted[2]:
        # Never the rows themselves: the program may go on to write into them.
        by_bias = wrap(ctx, rows.sum(1))
    return by_input, by_weight, by_bias


def _by_single_ops(shape: tuple[int, ...], wanted: Any, grad: Tensor, input: Any, weight: Any) -> tuple[Any, Any, Any]:
    """The same by ops that the interpreter sees, and that autograd can differentiate again."""
    rows = grad.reshape(-1, grad.shape[-1])
    by_input = (rows @ weight).reshape(shape) if wanted[0] else None
    by_weight = rows.t() @ input.reshape(-1, shape[-1]) if wanted[1] else None
    return by_input, by_weight, rows.sum(0) if wanted[2] else None


COMPOSITES = {F.linear: _linear, **LISTS}
skip(CompositeMode.__torch_function__)
skip(Linear.backward)
