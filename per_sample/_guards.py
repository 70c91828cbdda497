"""What an op must not do to per-sample tensors: every refusal of the interpreter, with what to do instead."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from per_sample import _fallback
from per_sample._batched import Batched, Context, storage_of
from per_sample._caller import Restart
from per_sample._errors import DataDependentError, RandomnessError, RuleError, SharedWriteError, UnsupportedError

aten = torch.ops.aten

_DATA_DEPENDENT = {
    aten._local_scalar_dense.default: "`.item()`, `float()`, `int()` or a branch (`if`, `bool()`)",
    aten.is_nonzero.default: "a branch (`if`, `bool()`)",
    aten.equal.default: "`torch.equal`",
    aten.nonzero.default: "`nonzero`, or indexing with a mask",
    aten.masked_select.default: "`masked_select`, or indexing with a mask",
    aten.index.Tensor: "indexing with a mask",
    aten.index_put.default: "indexing with a mask",
    aten.index_put_.default: "indexing with a mask",
    aten._unique2.default: "`unique`",
    aten.unique_dim.default: "`unique`",
    aten.unique_consecutive.default: "`unique_consecutive`",
}


DATA_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _has_mask(values: list[Any]) -> bool:
    """Whether an index is a mask that differs between samples, which selects a different number of elements in each."""
    return any(type(i) is Batched and i.dtype in (torch.bool, torch.uint8) for i in values[1])


def check_data(func: Any, values: list[Any]) -> None:
    """An op must not ask for the Python value, or the shape, of what differs between samples."""
    if func in _MASKED:
        if not _has_mask(values):
            return
    elif not DATA_TAGS & set(func.tags):
        return
    raise DataDependentError(
        f"{_DATA_DEPENDENT.get(func, f'`{func}`')} asks for the value of a tensor that differs between samples. Use `torch.where` or "
        "masks instead of a branch, keep the value as a tensor, or return it with `has_aux=True`."
    )


def check_closure(ctx: Context, x: Tensor) -> None:
    """Begin again with the caller's context if a tensor that requires grad comes from outside the function.

    Inside functorch transforms of the program's own, tensors born in the function require grad too; those are no concern.
    """
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
    if any(type(leaf) is not Batched and storage_of(leaf) not in ctx.born for leaf in leaves):
        raise Restart(ctx)


def settle(ctx: Context) -> None:
    """Materialise what is still factored, before an in-place op changes the operands."""
    if ctx.pending:
        with nullcontext() if ctx.caller is None else ctx.caller():
            for factored in list(ctx.pending.values()):
                factored.physical  # noqa: B018


def check_outside(ctx: Context, func: Any, args: Any, writes: tuple[int, ...]) -> None:
    """A tensor from outside the function must not change: the function runs once for all samples, and sometimes twice."""
    for i in writes:
        target = args[i] if i < len(args) else None
        # Counters of calls, such as batch norm's, are let through.
        if isinstance(target, Tensor) and storage_of(target) not in ctx.born and (target.dim() or target.is_floating_point()):
            raise SharedWriteError(
                f"`{func}` changes a tensor of shape {list(target.shape)} from outside the function in place. The function runs once "
                "for all samples, so the result would differ from one run a sample. Work on a copy, or return it with `has_aux=True`."
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


def check_writes(ctx: Context, func: Any, writes: tuple[int, ...], values: list[Any]) -> None:
    """An in-place op must not put one sample's value where others read, nor change a tensor of the caller's."""
    settle(ctx)
    for i in writes:
        target = values[i] if i < len(values) else None
        if not isinstance(target, Tensor):
            raise UnsupportedError(f"`{func}` with `out=` is not supported on per-sample tensors; use the form that returns its result.")
        if type(target) is not Batched or target.ctx is not ctx:
            if any(type(v) is Batched and v.ctx is ctx for v in values):
                raise SharedWriteError(
                    f"`{func}` writes a per-sample value into a tensor of shape {list(target.shape)} that all samples share. Make the "
                    "target from a per-sample tensor (`x.new_zeros(...)`, `torch.zeros_like(x)`), or build the result with `torch.stack`."
                )
            value = target
        else:
            value = target.physical
        if storage_of(value) in ctx.split:
            raise UnsupportedError(
                f"`{func}` writes into a tensor that shares memory with another one in torch, but not here (a gradient with views, or a "
                "lazy conjugate). Use the form that returns its result, or clone the tensor first."
            )
        if not ctx.owns(value):
            if type(target) is Batched and not ctx.copies:
                raise Restart(ctx, copies=True)
            raise SharedWriteError(
                f"`{func}` would change an argument of the transform in place (shape {list(target.shape)}); inputs are never modified. "
                "Write into a copy: `x = x.clone()` first."
            )


def check_shared_draw(func: Any, writes: tuple[int, ...]) -> None:
    """A shared tensor cannot be filled with different numbers for each sample."""
    if writes:
        raise RandomnessError(
            f"`{func}` fills a tensor that all samples share, so every sample would get the same numbers. Make the tensor from a "
            "per-sample one (`torch.empty_like(x)`, `x.new_empty(...)`), or pass randomness='same'."
        )


def refuse_shape(func: Any, rule: Any, out: Tensor, n: int) -> NoReturn:
    """A result without the sample axis in front."""
    name = getattr(rule, "__qualname__", "fallback")
    raise RuleError(
        f"The rule `{name}` of `{func}` returned a tensor of shape {list(out.shape)}; expected the physical result, whose axis 0 is the "
        f"sample axis of size {n}."
    )


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


def check_higher_order(ctx: Context, func: Any, args: Any, kwargs: Any) -> None:
    """Control flow and other ops that take functions have no rule."""
    if any(type(a) is Batched and a.ctx is ctx for a in pytree.arg_tree_leaves(*args, **kwargs)):
        raise UnsupportedError(f"The higher-order op `{func}` has no per-sample form yet; write it with ordinary torch ops.")
