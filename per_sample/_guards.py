"""What an op must not do to per-sample tensors: every refusal of the interpreter, with what to do instead."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from per_sample import _fallback, _registry
from per_sample._batched import Batched, Context, storage_of
from per_sample._caller import Restart, warn_of_replaced
from per_sample._errors import EscapedError, RandomnessError, RuleError, SharedWriteError, UnsupportedError
from per_sample._generators import remember

aten = torch.ops.aten


# Ops whose result has no derivative.
_WITHOUT = re.compile(r"aten::(new_\w+|\w+_like|gt|ge|lt|le|eq|ne|is\w+|sign|arg\w+|bernoulli)$")


def check_closure(ctx: Context, x: Tensor, func: Any) -> None:
    """Begin again with the caller's context if a tensor that requires grad comes from outside the function.

    Inside functorch transforms of the program's own, tensors born in the function require grad too; those are no concern.
    """
    if ctx.accumulates and x.grad_fn is None and storage_of(x) not in ctx.born:
        raise UnsupportedError(
            f"A reentrant checkpoint closes over a tensor of shape {list(x.shape)} that requires grad, and would change its `.grad`. Pass "
            "it as an argument of the checkpointed function, or use `use_reentrant=False`."
        )
    if ctx.grad_mode and ctx.caller is None and _comes_from_outside(ctx, x):
        raise Restart(ctx)
    if ctx.replaced and torch.is_grad_enabled() and not _WITHOUT.match(func._schema.name):
        warn_of_replaced(ctx, x)


def _comes_from_outside(ctx: Context, x: Tensor) -> bool:
    if x.grad_fn is None:
        leaves = [x]
    else:
        leaves, waiting, seen = [], [x.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            waiting += [following for following, _ in node.next_functions if following is not None]
    return any(type(leaf) is not Batched and storage_of(leaf) not in ctx.born for leaf in leaves)


def settle(ctx: Context) -> None:
    """Materialise what is still factored, before an in-place op changes the operands."""
    if ctx.pending:
        with nullcontext() if ctx.caller is None else ctx.caller():
            for reference in list(ctx.pending.values()):
                factored = reference()
                if factored is not None:
                    factored.physical  # noqa: B018
            ctx.pending.clear()


def check_outside(ctx: Context, func: Any, args: Any, kwargs: Any) -> None:
    """A tensor from outside the function must not change: the function runs once for all samples, and sometimes twice."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for target in pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
            _check_outside(ctx, func, target)


def _check_outside(ctx: Context, func: Any, target: Any) -> None:
    # Counters of calls, such as batch norm's, are let through.
    if isinstance(target, Tensor) and storage_of(target) not in ctx.born and (target.dim() or target.is_floating_point()):
        raise SharedWriteError(
            f"`{func}` changes a tensor of shape {list(target.shape)} from outside the function in place. The function runs once for all "
            "samples, so the result would differ from one run a sample. Pass the tensor as an argument, or work on a copy."
        )


def refuse_escaped(op: Any) -> NoReturn:
    """A tensor of a transform that has ended, or runs elsewhere."""
    raise EscapedError(
        f"`{op}` met a per-sample tensor of another transform, which has ended or runs in another thread. Return such values from the "
        "function (with `has_aux=True`) instead of storing them outside."
    )


def unshare_targets(ctx: Context, args: Any, values: list[Any], writes: tuple[int, ...]) -> None:
    """Give each sample its own copy of a shared value of the program's that a per-sample value is about to be written into.

    Only where nothing else looks at the same memory: a view would go on showing what all samples share.
    """
    for i in writes:
        target = args[i] if i < len(args) else None
        if type(target) is not Batched or target.ctx is not ctx or not target.shared:
            continue
        storage = storage_of(values[i])
        if storage is None or storage in ctx.borrowed or storage in ctx.viewed:
            continue
        with nullcontext() if ctx.caller is None else ctx.caller():
            target._value = values[i].expand(ctx.n, *target.shape).clone()
        target.shared = False
        values[i] = target


def check_writes(ctx: Context, func: Any, args: Any, writes: tuple[int, ...], values: list[Any]) -> None:
    """An in-place op must not put one sample's value where others read, nor change a tensor of the caller's."""
    settle(ctx)
    for i in writes:
        if isinstance(args[i], (list, tuple)):
            for arg, value in zip(args[i], values[i], strict=True):
                _check_write(ctx, func, arg, value, values)
        elif args[i] is not None:
            _check_write(ctx, func, args[i], values[i], values)


def _check_write(ctx: Context, func: Any, arg: Tensor, target: Tensor, values: list[Any]) -> None:
    own = type(target) is Batched and target.ctx is ctx
    if not own:
        lifted = type(arg) is Batched and arg.ctx is ctx
        made_inside = ctx.owns(target) if lifted else storage_of(target) in ctx.born
        if any(type(v) is Batched and v.ctx is ctx for v in pytree.tree_leaves(values)):
            if made_inside and ctx.expands < 2:
                raise Restart(ctx, expands=ctx.expands + 1)
            if lifted and not made_inside and ctx.copies < 3:
                raise Restart(ctx, copies=3)
            raise SharedWriteError(
                f"`{func}` writes a per-sample value into a tensor of shape {list(target.shape)} that all samples share. Make the "
                "target from a per-sample tensor (`x.new_zeros(...)`, `torch.zeros_like(x)`), or build the result with `torch.stack`."
            )
        if not lifted:
            _check_outside(ctx, func, target)
            return
    value = target.physical if type(target) is Batched and own else target
    if storage_of(value) in ctx.held:
        # An operand of a gradient that was handed on as it was; in the next run it is still here to be settled.
        raise Restart(ctx, after=True)
    if storage_of(value) in ctx.split:
        raise UnsupportedError(
            f"`{func}` writes into a tensor that shares memory with another one in torch, but not here (a gradient with views, or a "
            "lazy conjugate). Use the form that returns its result, or clone the tensor first."
        )
    if not ctx.owns(value):
        level = 1 if own else 2
        if ctx.copies < level:
            raise Restart(ctx, copies=level)
        raise SharedWriteError(
            f"`{func}` would change an argument of the transform, or a tensor from outside, in place (shape {list(target.shape)}); inputs "
            "are never modified. Write into a copy: `x = x.clone()` first."
        )


def check_shared_draw(ctx: Context, func: Any, writes: tuple[int, ...], values: list[Any]) -> None:
    """A shared tensor cannot be filled with different numbers for each sample: each gets its own of one that the program has made."""
    if writes:
        made_inside = all(i < len(values) and isinstance(values[i], Tensor) and storage_of(values[i]) in ctx.born for i in writes)
        if made_inside and ctx.expands < 2:
            raise Restart(ctx, expands=ctx.expands + 1)
        raise RandomnessError(
            f"`{func}` fills a tensor that all samples share, so every sample would get the same numbers. Make the tensor from a "
            "per-sample one (`torch.empty_like(x)`, `x.new_empty(...)`), or pass randomness='same'."
        )


def check_layout(func: Any, out: Tensor) -> None:
    """A wrapper shows strided memory, and must hold nothing else."""
    if out.layout is not torch.strided:
        raise UnsupportedError(f"`{func}` gives a tensor of layout {out.layout}, which has no per-sample form here; use the dense form.")


def refuse_shape(func: Any, rule: Any, out: Tensor, n: int) -> NoReturn:
    """A result without the sample axis in front."""
    name = getattr(rule, "__qualname__", "fallback")
    raise RuleError(
        f"The rule `{name}` of `{func}` returned a tensor of shape {list(out.shape)}; expected the physical result, whose axis 0 is the "
        f"sample axis of size {n}."
    )


def draws(op: Any, values: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a random op draws; from a generator of the program's own, what it draws may have to be drawn again."""
    generator = kwargs.get("generator")
    if generator is not None:
        remember(generator)
    return _registry.draws(op, values, kwargs)


def check_random(ctx: Context, func: Any) -> None:
    """A random op needs to be told whether the samples share its numbers."""
    if ctx.randomness == "error":
        refuse_random(func)
    if ctx.randomness == "same" and not _fallback.has_vmap_rule(func):
        raise RandomnessError(f"`{func}` has no form in which all samples draw the same numbers; pass randomness='different'.")


def refuse_random(func: Any) -> NoReturn:
    """Random numbers, and nobody has said whose."""
    raise RandomnessError(
        f"`{func}` draws random numbers, and randomness='error' (the default) does not say whether the samples share them. Pass "
        "randomness='different' (each sample its own) or 'same'."
    )


_CONTROL = {torch.ops.higher_order.cond, torch.ops.higher_order.while_loop}


def check_higher_order(ctx: Context, func: Any, args: Any, kwargs: Any) -> None:
    """Control flow is caught by ``FunctionMode``; other ops that take functions have no rule."""
    if func in _CONTROL and ctx.splits and not ctx.functions:
        raise Restart(ctx, functions=True)
    if any(type(a) is Batched and a.ctx is ctx for a in pytree.arg_tree_leaves(*args, **kwargs)):
        raise UnsupportedError(f"The higher-order op `{func}` has no per-sample form yet; write it with ordinary torch ops.")
